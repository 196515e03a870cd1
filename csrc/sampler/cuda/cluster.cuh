// Blocks of a cluster: rank, barrier and each other's shared memory. On devices without clusters, and
// in a launch without them, a row's only block is a cluster of one and the barrier a block's own.
#pragma once

#include <cstdint>

namespace twinjet::sampler::cuda {

struct Cluster {
  uint32_t rank;
  uint32_t size;
};

__device__ __forceinline__ Cluster ThisCluster() {
  Cluster cluster = {0, 1};
#if __CUDA_ARCH__ >= 900
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(cluster.rank));
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(cluster.size));
#endif
  return cluster;
}

// Says that this block runs. Orders nothing: a release here would wait for the copies just started.
__device__ __forceinline__ void ClusterArriveRelaxed(const Cluster& cluster) {
#if __CUDA_ARCH__ >= 900
  if (cluster.size > 1) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void ClusterArrive(const Cluster& cluster) {
#if __CUDA_ARCH__ >= 900
  if (cluster.size > 1) asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}

__device__ __forceinline__ void ClusterWait(const Cluster& cluster) {
#if __CUDA_ARCH__ >= 900
  if (cluster.size > 1) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// All threads of all blocks of the row: what was written before, to any block, is seen after.
__device__ __forceinline__ void ClusterSync(const Cluster& cluster) {
  if (cluster.size > 1) {
    ClusterArrive(cluster);
    ClusterWait(cluster);
  } else {
    __syncthreads();
  }
}

// Writes to the same place in the shared memory of block `rank`.
__device__ __forceinline__ void StoreRemote(uint64_t* local, uint64_t value, uint32_t rank,
                                            const Cluster& cluster) {
#if __CUDA_ARCH__ >= 900
  if (cluster.size > 1) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(local));
    uint32_t remote;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(remote), "l"(value) : "memory");
    return;
  }
#endif
  *local = value;
}

// ---- Barriers that count bytes: the cheap way to hand a few words to another block ----

__device__ __forceinline__ uint32_t SharedAddress(const void* local) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(local));
}

__device__ __forceinline__ void InitBarrier(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(SharedAddress(barrier)) : "memory");
#endif
}

// Ends a barrier's life; nobody waits for it any more.
__device__ __forceinline__ void InvalidateBarrier(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.inval.shared.b64 [%0];" ::"r"(SharedAddress(barrier)) : "memory");
#endif
}

// Makes initialised barriers known to the cluster and to the copy engine.
__device__ __forceinline__ void FenceBarrierInit() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// The phase ends when this was called once and `bytes` have arrived.
__device__ __forceinline__ void ExpectBytes(uint64_t* barrier, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(SharedAddress(barrier)), "r"(bytes)
               : "memory");
#endif
}

__device__ __forceinline__ void WaitPhase(uint64_t* barrier, uint32_t phase) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait;\n"
      "}\n" ::"r"(SharedAddress(barrier)),
      "r"(phase)
      : "memory");
#endif
}

// The same for bytes that this block's own copies bring.
__device__ __forceinline__ void WaitCopy(uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
      "@!done bra wait;\n"
      "}\n" ::"r"(SharedAddress(barrier))
      : "memory");
#endif
}

// Writes to the same place in the shared memory of block `rank` and counts it at that block's barrier.
__device__ __forceinline__ void SendRemote(uint64_t* local, uint64_t value, uint64_t* barrier,
                                           uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  uint32_t remote, remote_barrier;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(SharedAddress(local)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_barrier) : "r"(SharedAddress(barrier)), "r"(rank));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u64 [%0], %1, [%2];" ::"r"(remote),
               "l"(value), "r"(remote_barrier)
               : "memory");
#endif
}

// Reads the same place in the shared memory of block `rank`.
__device__ __forceinline__ float LoadRemote(const float* local, uint32_t rank, const Cluster& cluster) {
#if __CUDA_ARCH__ >= 900
  if (cluster.size > 1) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(local));
    uint32_t remote;
    float value;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(remote) : "memory");
    return value;
  }
#endif
  return *local;
}

__device__ __forceinline__ uint64_t LoadRemote(const uint64_t* local, uint32_t rank, const Cluster& cluster) {
#if __CUDA_ARCH__ >= 900
  if (cluster.size > 1) {
    const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(local));
    uint32_t remote;
    uint64_t value;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
    asm volatile("ld.shared::cluster.u64 %0, [%1];" : "=l"(value) : "r"(remote) : "memory");
    return value;
  }
#endif
  return *local;
}

}  // namespace twinjet::sampler::cuda
