#include "kernels.h"
namespace turborank { const Kernels* amx_kernels(Precision, unsigned) { return nullptr; } }
