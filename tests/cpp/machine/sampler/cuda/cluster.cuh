// csrc/sampler/cuda/cluster.cuh for the machine on the host.
#pragma once

#include "machine.h"

namespace twinjet::sampler::cuda {

struct Cluster {
  uint32_t rank;
  uint32_t size;
};

inline Cluster ThisCluster() { return {machine::Now().rank(), machine::Now().cluster_size()}; }
inline void ClusterArriveRelaxed(const Cluster& cluster) {
  if (cluster.size > 1) machine::Now().ArriveAtCluster();
}
inline void ClusterArrive(const Cluster& cluster) { ClusterArriveRelaxed(cluster); }
inline void ClusterWait(const Cluster& cluster) {
  if (cluster.size > 1) machine::Now().WaitForCluster();
}
inline void ClusterSync(const Cluster& cluster) {
  if (cluster.size > 1) {
    ClusterArrive(cluster);
    ClusterWait(cluster);
  } else {
    __syncthreads();
  }
}
inline void WaitCycles(int32_t) {}

inline void InitBarrier(uint64_t* barrier) { machine::Now().InitBarrier(barrier); }
inline void FenceBarrierInit() {}
inline void ExpectBytes(uint64_t* barrier, uint32_t bytes) { machine::Now().ExpectBytes(barrier, bytes); }
inline void WaitPhase(uint64_t* barrier, uint32_t phase) { machine::Now().WaitPhase(barrier, phase); }
inline void FenceForCopies() {}

inline void StartCopy(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
  machine::Now().Send([=] { std::memcpy(shared, global, bytes); }, barrier, machine::Now().rank(), bytes);
}
inline void StartPrefetch(const void*, uint32_t) {}

template <class T>
void SendRemote(const T* local, const T& value, const uint64_t* barrier, uint32_t rank) {
  T* place = const_cast<T*>(machine::Now().InBlock(local, rank));
  machine::Now().Send([=] { *place = value; }, barrier, rank, sizeof(T));
}
inline void SendRemote(const uint32_t* local, uint32_t value, const uint64_t* barrier, uint32_t rank) {
  SendRemote<uint32_t>(local, value, barrier, rank);
}
inline uint64_t LoadRemote(const uint64_t* local, uint32_t rank, const Cluster& cluster) {
  return cluster.size > 1 ? *machine::Now().InBlock(local, rank) : *local;
}

}  // namespace twinjet::sampler::cuda
