/* A libcuda.so.1 for machines without one: it loads nothing, and writes down what it is told to
   launch. The test says first how many bytes each parameter of the next launch has. */
#include <stdio.h>
#include <string.h>

#define MOST (1 << 16)

static unsigned char bytes[MOST];
static int sizes[1024], count, used;
static unsigned shape[7];
static void *stream;
static int launches, modules;

void stub_expect(const int *given, int n) {
  memcpy(sizes, given, n * sizeof(int));
  count = n;
}

/* grid, threads, shared memory; the stream; the parameters' bytes, how many there are */
int stub_launched(unsigned *to_shape, void **to_stream, unsigned char *to_bytes) {
  memcpy(to_shape, shape, sizeof shape);
  *to_stream = stream;
  memcpy(to_bytes, bytes, used);
  return used;
}

int stub_launches(void) { return launches; }
int stub_modules(void) { return modules; }

static int note(const unsigned *now, void *on, void **parameters) {
  memcpy(shape, now, sizeof shape);
  stream = on;
  used = 0;
  for (int i = 0; i < count; ++i) {
    memcpy(bytes + used, parameters[i], sizes[i]);
    used += sizes[i];
  }
  ++launches;
  return 0;
}

int cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned bx, unsigned by,
                   unsigned bz, unsigned shared, void *on, void **parameters, void **extra) {
  unsigned now[] = {x, y, z, bx, by, bz, shared};
  return note(now, on, parameters);
}

struct configuration {
  unsigned x, y, z, bx, by, bz, shared;
  void *stream;
};

int cuLaunchKernelEx(const struct configuration *c, void *function, void **parameters,
                     void **extra) {
  unsigned now[] = {c->x, c->y, c->z, c->bx, c->by, c->bz, c->shared};
  return note(now, c->stream, parameters);
}

static int handle;
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuGetErrorString(int status, const char **text) { *text = "an error of the stub"; return 0; }
int cuCtxGetCurrent(void **context) { *context = &handle; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetCount(int *n) { *n = 1; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 227 << 10; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &handle; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute ? 0 : 1024; /* threads */
  return 0;
}
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int config) { return 0; }
int cuModuleLoadData(void **module, const void *image) {
  ++modules;
  *module = &handle;
  return memcmp(image, "\177ELF", 4) ? 200 : 0; /* CUDA_ERROR_INVALID_IMAGE */
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
  *function = &handle;
  return 0;
}
int cuModuleUnload(void *module) { return 0; }
int cuOccupancyMaxActiveClusters(int *n, void *function, const void *config) { *n = 1; return 0; }
int cuPointerGetAttribute(void *value, int attribute, unsigned long long pointer) {
  *(unsigned long long *)value = pointer;
  return 0;
}
int cuStreamIsCapturing(void *on, int *state) { *state = 0; return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
