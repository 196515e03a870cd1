// What a device allows these kernels.
#include "sampler/cuda/launch.cuh"

namespace twinjet::sampler::cuda {

cudaError_t QueryLimits(int device, DeviceLimits* limits) {
  *limits = {};
  int value = 0;
  cudaError_t error = cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  limits->num_multiprocessors = value;
  error = cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  limits->max_shared_bytes = static_cast<size_t>(value);
  int clock_khz = 0, memory_khz = 0, bus_bits = 0;
  error = cudaDeviceGetAttribute(&clock_khz, cudaDevAttrClockRate, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&memory_khz, cudaDevAttrMemoryClockRate, device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&bus_bits, cudaDevAttrGlobalMemoryBusWidth, device);
  if (error != cudaSuccess) return error;
  // Two transfers a cycle of the memory's clock.
  if (clock_khz > 0) limits->bytes_per_cycle = 2.0 * memory_khz * bus_bits / 8 / clock_khz;
  error = cudaDeviceGetAttribute(&value, cudaDevAttrClusterLaunch, device);
  if (error != cudaSuccess) return error;
  limits->max_cluster = value != 0 ? kMaxCluster : 1;
  error = SetSampleAttributes(*limits);
  if (error != cudaSuccess) return error;
  error = SetLogprobsAttributes(*limits);
  if (error != cudaSuccess || limits->max_cluster == 1) return error;
  // A cluster of 16 is more than every device promises: ask.
  int num_clusters = 0;
  error = CountClusters(limits->max_cluster, limits->max_shared_bytes, &num_clusters);
  if (error != cudaSuccess || num_clusters == 0) {
    cudaGetLastError();  // the refusal is the answer
    limits->max_cluster = 8;
  }
  return cudaSuccess;
}

}  // namespace twinjet::sampler::cuda
