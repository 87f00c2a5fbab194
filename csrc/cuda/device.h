// What the kernels need from nvcc; emulation/device.h has the same names for a host compiler.
#pragma once
#include <cuda_runtime.h>

#define FASTMAML_DEVICE __device__ __forceinline__

namespace fastmaml::cuda {

// The block's dynamic shared memory. Named where it is used: handed on as a pointer, it would be one into any
// memory, whose loads are slower.
template <class T>
FASTMAML_DEVICE T* shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
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
