/* libcuda.so.1 of a machine whose driver does not get further than its own version, or cuInit. */
#include <cuda_runtime_api.h>
#include <stdlib.h>
#include <string.h>

static int number(const char* name, int otherwise) {
  const char* value = getenv(name);
  return value ? atoi(value) : otherwise;
}

int cuDriverGetVersion(int* version) {
  *version = number("STUB_VERSION", CUDART_VERSION);
  return 0;
}

int cuInit(unsigned flags) { return number("STUB_INIT", 0); }

int cuDeviceGetCount(int* count) {
  *count = 1;
  return 0;
}

int cuGetExportTable(const void** table, const void* id) {
  *table = 0;
  return 500;
}

static int missing(void) { return 999; }

int cuGetProcAddress_v2(const char* name, void** f, int version, unsigned long flags, void* status) {
  *f = !strcmp(name, "cuInit")               ? (void*)cuInit
       : !strcmp(name, "cuDriverGetVersion") ? (void*)cuDriverGetVersion
       : !strcmp(name, "cuDeviceGetCount")   ? (void*)cuDeviceGetCount
       : !strcmp(name, "cuGetExportTable")   ? (void*)cuGetExportTable
       : !strncmp(name, "cuGetProcAddress", 16) ? (void*)cuGetProcAddress_v2
                                                : (void*)missing;
  return 0;
}

int cuGetProcAddress(const char* name, void** f, int version, unsigned long flags) {
  return cuGetProcAddress_v2(name, f, version, flags, 0);
}
