// What the loader (ect_kernels/cpu.py) asks of a library: the digest of its sources, and what each launcher takes.
#include "launchers.h"

namespace {
template <class T> constexpr char kind() { return 'p'; }   // an address
template <> constexpr char kind<int64_t>() { return 'i'; }
template <> constexpr char kind<double>() { return 'd'; }
template <class F> struct Signature;
template <class... A> struct Signature<int(A...)> { static constexpr char text[] = {kind<A>()..., 0}; };
}  // namespace

#pragma GCC visibility push(default)
extern "C" {
const char* ect_sources() { return ECT_SOURCES; }
#define TAKES(name) const char* name##_takes() { return Signature<decltype(name)>::text; }
LAUNCHERS(TAKES)
}
#pragma GCC visibility pop
