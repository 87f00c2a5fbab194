// What the kernels need from nvcc; emulation/device.h has the same names for a host compiler.
#pragma once
#include <cuda_runtime.h>

#include "table.h"

#define FASTMAML_DEVICE __device__ __forceinline__

namespace fastmaml::cuda {

// The block's dynamic shared memory. Named where it is used: handed on as a pointer, it would be one into any
// memory, whose loads are slower.
template <class T>
FASTMAML_DEVICE T* shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

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
// Is there code in this binary for the current device? An error if not.
template <class... Parameters>
int has_code(void (*kernel)(Parameters...)) {
  cudaFuncAttributes found;
  return reported(cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(kernel)));
}
inline int devices() {
  int count = 0;
  return reported(cudaGetDeviceCount(&count)) == cudaSuccess ? count : 0;
}
// This runtime has a current device of its own, besides that of torch's.
inline int use(int device) { return reported(cudaSetDevice(device)); }
inline const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, int bytes, void* stream,
           const Arguments&... arguments) {
  if (bytes > 48 << 10) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return reported(error);
  }
  kernel<<<blocks, threads, bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

}  // namespace fastmaml::cuda
