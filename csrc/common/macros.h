// Functions that both backends compile, and those that must be inlined: where a processor's vectors
// are short, GCC calls functions of many operations, and every call spills all vectors.
#pragma once

#if defined(__CUDACC__)
#define MTP_HD __host__ __device__
#else
#define MTP_HD
#endif
#define MTP_INLINE __attribute__((always_inline)) inline
