// The one macro of the project: functions that both backends compile.
#pragma once

#if defined(__CUDACC__)
#define MTP_HD __host__ __device__
#else
#define MTP_HD
#endif
