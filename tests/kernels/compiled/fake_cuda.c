// A CUDA driver that runs nothing and writes down what it is asked: libcuda.so.1 for tests.
// Triton's launcher and ours, run against it, must ask for the same things.
#include "cuda.h"
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int fake_parameters = 0;  // set by the test: cuLaunchKernelEx is not told how many there are
size_t fake_sizes[256];

static void note(const char *format, ...) {
  FILE *log = fopen(getenv("FAKE_CUDA_LOG"), "a");
  va_list arguments;
  va_start(arguments, format);
  vfprintf(log, format, arguments);
  va_end(arguments);
  fclose(log);
}

static void note_bytes(const void *bytes, size_t size) {
  for (size_t i = 0; i < size; ++i)
    note("%02x", ((const unsigned char *)bytes)[i]);
}

static uint64_t hash(const void *bytes, size_t size, uint64_t h) {
  for (size_t i = 0; i < size; ++i)
    h = (h ^ ((const unsigned char *)bytes)[i]) * 1099511628211ull;
  return h;
}

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) {
  *version = atoi(getenv("FAKE_CUDA_VERSION"));
  return CUDA_SUCCESS;
}
CUresult cuGetErrorString(CUresult code, const char **text) {
  *text = "fake error";
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetCount(int *count) {
  *count = 1;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  *device = ordinal;
  return CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR                   ? 9
           : attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN        ? 232448
           : attribute == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR     ? 233472
           : attribute == CU_DEVICE_ATTRIBUTE_WARP_SIZE                                ? 32
                                                                                       : 0;
  return CUDA_SUCCESS;
}

static CUcontext current = NULL;
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  *context = (CUcontext)0xc0;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *context) {
  *context = current;
  return CUDA_SUCCESS;
}
CUresult cuCtxSetCurrent(CUcontext context) {
  current = context;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice *device) {
  *device = 0;
  return CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_ERROR_NOT_SUPPORTED; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  *status = CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)data = pointer;
  return CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  const Elf64_Ehdr *elf = image;
  size_t sections = elf->e_shoff + (size_t)elf->e_shnum * elf->e_shentsize;
  size_t segments = elf->e_phoff + (size_t)elf->e_phnum * elf->e_phentsize;
  size_t size = sections > segments ? sections : segments;
  note("load %zu bytes %016llx\n", size, (unsigned long long)hash(image, size, 0));
  *module = (CUmodule)0xd0;
  return CUDA_SUCCESS;
}
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  note("function %s\n", name);
  *function = (CUfunction)0xf0;
  return CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  // Triton refuses a kernel whose block is larger than this
  *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES &&
      attribute != CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED)
    return CUDA_ERROR_INVALID_VALUE;  // oversized shared memory: Triton asks first, as on Hopper
  note("allow attribute %d value %d\n", attribute, value);
  return CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) {
  note("cache %d\n", config);
  return CUDA_SUCCESS;
}

CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank,
                                void *address, const cuuint64_t *sizes, const cuuint64_t *strides,
                                const cuuint32_t *box, const cuuint32_t *element_strides,
                                CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion l2, CUtensorMapFloatOOBfill fill) {
  note("encode type %d rank %u address %p interleave %d swizzle %d l2 %d fill %d", type, rank,
       address, interleave, swizzle, l2, fill);
  uint64_t h = hash(&address, sizeof(address), type + 16 * swizzle + 64 * fill + 256 * rank);
  for (cuuint32_t i = 0; i < rank; ++i) {
    uint64_t stride = i + 1 < rank ? strides[i] : 0;  // the driver reads no more of them
    note(" dim %llu %llu %u %u", (unsigned long long)sizes[i], (unsigned long long)stride, box[i],
         element_strides[i]);
    uint64_t dim[4] = {sizes[i], stride, box[i], element_strides[i]};
    h = hash(dim, sizeof(dim), h);
  }
  note("\n");
  for (int i = 0; i < 16; ++i)
    ((uint64_t *)map)[i] = (h * (2 * i + 1)) | 1ull << 21;
  return CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction function, void **parameters,
                          void **extra) {
  note("launch grid %u %u %u block %u %u %u shared %u stream %p function %p extra %p",
       config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX, config->blockDimY,
       config->blockDimZ, config->sharedMemBytes, config->hStream, function, extra);
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const CUlaunchAttribute *attribute = &config->attrs[i];
    note(" attribute %d", attribute->id);
    if (attribute->id == CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
      note(" %u %u %u", attribute->value.clusterDim.x, attribute->value.clusterDim.y,
           attribute->value.clusterDim.z);
    else
      note(" %d", *(const int *)&attribute->value);
  }
  note("\n");
  for (int i = 0; i < fake_parameters; ++i) {
    note("parameter ");
    note_bytes(parameters[i], fake_sizes[i]);
    if (fake_sizes[i] == sizeof(CUtensorMap) && (uintptr_t)parameters[i] % 64)
      note(" misaligned");
    note("\n");
  }
  return CUDA_SUCCESS;
}

// cuda-bindings asks for functions by their names without a version
CUresult cuGetProcAddress_v2(const char *name, void **function, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *status) {
  void *library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  *function = dlsym(library, name);
  if (!*function && !strcmp(name, "cuGetProcAddress"))
    *function = (void *)cuGetProcAddress_v2;
  if (status)
    *status = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
