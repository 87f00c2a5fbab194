// What the kernels need from nvcc; emulation/device.h has the same names for a host compiler.
#pragma once
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "table.h"

#define FASTMAML_DEVICE __device__ __forceinline__
// is there such a team on the architecture that is compiled for?
#define FASTMAML_HAS_TEAM (!FASTMAML_CLUSTER || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900)

namespace fastmaml::cuda {

// The block's dynamic shared memory. Named where it is used: handed on as a pointer, it would be one into any
// memory, whose loads are slower.
template <class T>
FASTMAML_DEVICE T* own_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

// Waits for all of the grid, whose blocks must all be running: launch sees to that.
FASTMAML_DEVICE void sync_grid() { cooperative_groups::this_grid().sync(); }

namespace FASTMAML_TEAM {
#if FASTMAML_CLUSTER
FASTMAML_DEVICE unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
FASTMAML_DEVICE unsigned cluster_blocks() {
  unsigned blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
}
// of each block, in bytes
FASTMAML_DEVICE unsigned shared_bytes() {
  unsigned bytes;
  asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
  return bytes;
}
// What `own` points to in that block of the cluster
template <class T>
FASTMAML_DEVICE T* shared_of(unsigned block, T* own) {
  T* there;
  asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(own), "r"(block));
  return there;
}
FASTMAML_DEVICE void sync_team() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}
#else
FASTMAML_DEVICE void sync_team() { __syncthreads(); }
#endif
}  // namespace FASTMAML_TEAM

// A number rounded to TF32; two to bfloat16, the first in the lower half.
FASTMAML_DEVICE uint32_t to_tf32(float v) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(v));
  return bits;
}
FASTMAML_DEVICE uint32_t to_bf16(float low, float high) {
  uint32_t bits;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  return bits;
}
// sum += A B of a tile, by all lanes of a warp: see mma.cuh
template <Precision P, class Sums>
FASTMAML_DEVICE void multiply_add(Sums& sum, const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  float &c0 = sum[0].at[0], &c1 = sum[0].at[1], &c2 = sum[1].at[0], &c3 = sum[1].at[1];
  if constexpr (P == tf32)
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c0), "+f"(c1), "+f"(c2), "+f"(c3)
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// An error that is returned must not be there for the next launch to find.
inline cudaError_t reported(cudaError_t error) {
  if (error != cudaSuccess) (void)cudaGetLastError();
  return error;
}

// The most that a block of this device may have, in bytes; below 0: an error, negated.
inline int shared_limit(int device) {
  int bytes = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return error == cudaSuccess ? bytes : -int(reported(error));
}
// Is there code in this binary for the current device, made for one of that compute capability or newer? An
// error if not.
template <class... Parameters>
int has_code(void (*kernel)(Parameters...), int least = 80) {
  cudaFuncAttributes found;
  if (const int error = reported(cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(kernel))))
    return error;
  return found.ptxVersion >= least ? 0 : cudaErrorNoKernelImageForDevice;
}
inline int devices() {
  int count = 0;
  return reported(cudaGetDeviceCount(&count)) == cudaSuccess ? count : 0;
}
// This runtime has a current device of its own, besides that of torch's.
inline int use(int device) { return reported(cudaSetDevice(device)); }
inline const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }
inline bool has_clusters(int device) {
  int found = 0;
  return reported(cudaDeviceGetAttribute(&found, cudaDevAttrClusterLaunch, device)) == cudaSuccess && found;
}

// Runs at most `teams` teams, as many as there is room for at once.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), unsigned teams, const Team& team, void* stream,
           const Arguments&... arguments) {
  const void* const code = reinterpret_cast<const void*>(kernel);
  int error = 0, device = 0, processors = 0, most = 0;
  if (team.bytes > 48 << 10)
    error = cudaFuncSetAttribute(code, cudaFuncAttributeMaxDynamicSharedMemorySize, team.bytes);
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {team.blocks, 1, 1};
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(teams * team.blocks);
  config.blockDim = dim3(team.threads);
  config.dynamicSmemBytes = team.bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = 1;
  if (!error && team.blocks > 1) {
    error = cudaOccupancyMaxActiveClusters(&most, kernel, &config);
  } else if (!error) {
    error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (!error)
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&most, code, int(team.threads), team.bytes);
    most *= processors;
  }
  if (!error && most == 0) return cudaErrorLaunchOutOfResources;
  config.gridDim.x = std::min(teams, unsigned(most)) * team.blocks;
  config.attrs = team.blocks > 1 ? attributes : attributes + 1;
  config.numAttrs = team.blocks > 1 ? 2 : 1;
  if (!error) error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return reported(cudaError_t(error));
}

}  // namespace fastmaml::cuda
