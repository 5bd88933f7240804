// Every launcher of the extension: pointers, int64_t and double only (see ect_kernels/native.py), the stream last.
#pragma once
#include <cstdint>

extern "C" {

}

// One name a launcher; bindings.cpp and the tests walk this list.
#define LAUNCHERS(X)
