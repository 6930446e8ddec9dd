// Arithmetic shared by all instruction sets, written with the vector F of W floats.
// Included inside an anonymous namespace. Uses no functions of std::, for the reason at TR_INLINE in kernels.h.

#define TR_LAMBDA __attribute__((always_inline))

constexpr float kLog2e = 1.44269504088896341f;

TR_INLINE int at_most(int a, int b) { return a < b ? a : b; }
TR_INLINE int at_least(int a, int b) { return a > b ? a : b; }

template <class A, class B> constexpr bool same_type = std::is_same_v<A, B>;
template <class Op, class Integer, class Other> using ForInt8 = std::conditional_t<same_type<Op, Int8>, Integer, Other>;

TR_INLINE void prefetch(const void* line) { __builtin_prefetch(line, 0, 2); }

// Adds the time from its construction to the end of the scope to a part's total.
class Lap {
public:
    TR_INLINE Lap(Scratch& s, Part part) : spent_(s.spent[part]), start_(nanoseconds()) {}
    TR_INLINE ~Lap() { spent_ += nanoseconds() - start_; }
    Lap(const Lap&) = delete;
    Lap& operator=(const Lap&) = delete;

private:
    uint64_t& spent_;
    const uint64_t start_;
};

template <int N>
TR_INLINE F horner(F x, const float (&c)[N]) {
    F y = set(c[N - 1]);
    for (int i = N - 2; i >= 0; --i) y = fma(y, x, set(c[i]));
    return y;
}

TR_INLINE void store2(float* p, F a, F b) {
    store(p, a);
    store(p + W, b);
}

// The maximum of |x| over a row or, without `sizes`, of x and 0.
template <bool sizes, class E>
float largest(const E* row, int n) {
    F top = set(0.0f);
    for (int c = 0; c < n; c += W) top = vmax(top, sizes ? vabs(load(row + c)) : load(row + c));
    return hmax(top);
}

#include "mix.inl"

// 2^x with a relative error of 8e-5 or, if exact, 8e-8; 0 below 2^-126. The polynomials are minimax fits, on [0, 1) if
// the instruction set computes the fraction in one instruction (TR_FRACTION), else on [-1/2, 1/2].
template <bool exact>
TR_INLINE F exp2(F x) {
#ifdef TR_FRACTION
    static constexpr float fast[] = {0.9999251961708069f, 0.6958335041999817f, 0.2260671705007553f, 0.07802452146006989f};
    static constexpr float fine[] = {0.9999999403953552f,  0.6931530833244324f,   0.24015361070632935f,
                                     0.05582631751894951f, 0.008989340625703335f, 0.0018775766948238015f};
    const F rest = fraction(x), n = x;
#else
    static constexpr float fast[] = {0.9999280571937561f, 0.6932609677314758f, 0.2426111400127411f, 0.0551716685295105f};
    static constexpr float fine[] = {1.0000001192092896f,   0.6931469440460205f,  0.24022120237350464f,
                                     0.05550713092088699f, 0.009675541892647743f, 0.001327647129073739f};
    const F n = round(x), rest = x - n;
#endif
    return scale2(exact ? horner(rest, fine) : horner(rest, fast), n);
}

// x Phi(x). Exact: erfc by Abramowitz & Stegun 7.1.26 (error 1.5e-7). Fast: an odd polynomial for Phi on [-3.7, 3.7] that
// reaches 0 and 1 at the ends; error 5e-4 inside and 4e-4 outside. Rounding to bf16 has a relative error of up to 2e-3.
template <bool exact>
TR_INLINE F gelu(F x) {
    if constexpr (exact) {
        static constexpr float c[] = {0.254829592f, -0.284496736f, 1.421413741f, -1.453152027f, 1.061405429f};
        const F size = vabs(x), z = size * set(0.70710678118654752f);
        const F t = set(1.0f) / fma(set(0.3275911f), z, set(1.0f));
        const F tail = horner(t, c) * t * exp2<true>(z * z * set(-kLog2e));
        return vmax(x, set(0.0f)) - size * set(0.5f) * tail;
    } else {
        static constexpr float c[] = {0.39647507667541504f, -0.0625876858830452f, 0.007848686538636684f,
                                      -0.0006175001035444438f, 2.688863969524391e-05f, -4.899703185401449e-07f};
        const F z = vmin(vmax(x, set(-3.7f)), set(3.7f));
        return x * fma(z, horner(z * z, c), set(0.5f));
    }
}

TR_INLINE F tanh_of(F x) {
    const F e = exp2<true>(vmin(vmax(x, set(-20.0f)), set(20.0f)) * set(2 * kLog2e));
    return set(1.0f) - set(2.0f) / (e + set(1.0f));
}

// The left side of a product; the last four members are for int8 only. starts[row] (32,) replaces the bias of a two-term
// row in the current panel; null for other rows. The residuals of the `fine` two-term rows are at rows `rest` and following
// (put_operands).
template <class Op>
struct Operand {
    const Op* rows;
    int stride;
    const float* scale = nullptr;  // one for each row
    const float* const* starts = nullptr;
    int fine = 0, rest = 0;
};
