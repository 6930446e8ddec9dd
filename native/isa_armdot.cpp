// 64-bit Arm with the dot product (Apple M1, Neoverse N1 and later): sdot multiplies signed bytes, four in each lane.
#include "kernels.h"

namespace turborank {
namespace {

constexpr int kInt8Group = 4;

#include "neon.inl"

#include "float_words.inl"
#include "attention.inl"
#include "attention_lanes.inl"
#include "kernels.inl"

constexpr int kBlockRows = 96;  // whose hidden rows are 0.6 MB in float: half of Neoverse N1's second-level cache
constexpr Kernels kInt8 = table<Int8, float>("sdot", kBlockRows, nothing, nothing);
constexpr Kernels kFloat = table<float, float>("fmla", kBlockRows, nothing, nothing);

}  // namespace

const Kernels* armdot_kernels(Precision precision, unsigned) {
    return precision == Precision::int8 ? &kInt8 : precision == Precision::fp32 ? &kFloat : nullptr;
}

}  // namespace turborank
