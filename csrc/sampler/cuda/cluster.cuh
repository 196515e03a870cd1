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

__device__ __forceinline__ void WaitCycles(int32_t cycles) {
  const int64_t begin = clock64();
  while (clock64() - begin < cycles) {
  }
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

// For bytes that copies or other blocks bring into this block's shared memory. Wider than this block's scope
// the wait would empty the L1 cache, for nothing.
__device__ __forceinline__ void WaitPhase(uint64_t* barrier, uint32_t phase) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "wait:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra wait;\n"
      "}\n" ::"r"(SharedAddress(barrier)),
      "r"(phase)
      : "memory");
#endif
}

// Orders this thread's accesses to shared memory before copies that a thread starts after the next barrier.
__device__ __forceinline__ void FenceForCopies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// Copies `bytes` (a multiple of 16, both addresses too) to shared memory and counts them at the barrier.
__device__ __forceinline__ void StartCopy(void* shared, const void* global, uint32_t bytes,
                                          uint64_t* barrier) {
#if __CUDA_ARCH__ >= 900
  // L2 need not keep what is read once.
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
      "[%3], "
      "%4;" ::"r"(SharedAddress(shared)),
      "l"(global), "r"(bytes), "r"(SharedAddress(barrier)), "l"(policy)
      : "memory");
#endif
}

__device__ __forceinline__ void StartPrefetch(const void* global, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes));
#endif
}

// The address in block `rank` of the same place in shared memory.
__device__ __forceinline__ uint32_t RemoteAddress(const void* local, uint32_t rank) {
  uint32_t remote = 0;
#if __CUDA_ARCH__ >= 900
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(SharedAddress(local)), "r"(rank));
#endif
  return remote;
}

// Write to the same place in the shared memory of block `rank` and count the bytes at that block's barrier.
__device__ __forceinline__ void SendRemote(const uint32_t* local, uint32_t value, const uint64_t* barrier,
                                           uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(
                   RemoteAddress(local, rank)),
               "r"(value), "r"(RemoteAddress(barrier, rank))
               : "memory");
#endif
}

__device__ __forceinline__ void SendRemote(const uint64_t* local, uint64_t value, const uint64_t* barrier,
                                           uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u64 [%0], %1, [%2];" ::"r"(
                   RemoteAddress(local, rank)),
               "l"(value), "r"(RemoteAddress(barrier, rank))
               : "memory");
#endif
}

__device__ __forceinline__ void SendRemote(const uint4* local, const uint4& value, const uint64_t* barrier,
                                           uint32_t rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.u32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
          RemoteAddress(local, rank)),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(RemoteAddress(barrier, rank))
      : "memory");
#endif
}

// Reads the same place in the shared memory of block `rank`.
__device__ __forceinline__ uint64_t LoadRemote(const uint64_t* local, uint32_t rank, const Cluster& cluster) {
#if __CUDA_ARCH__ >= 900
  if (cluster.size > 1) {
    uint64_t value;
    asm volatile("ld.shared::cluster.u64 %0, [%1];"
                 : "=l"(value)
                 : "r"(RemoteAddress(local, rank))
                 : "memory");
    return value;
  }
#endif
  return *local;
}

}  // namespace twinjet::sampler::cuda
