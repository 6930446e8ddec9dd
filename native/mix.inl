// Mixes the channels of a row before it is rounded to int8, so that a few large channels do not set the step size of all
// (docs/kernels.md, "Numbers in int8"). The weights of these products are mixed when they are packed (native_weights.py).
//
// Channels are divided into groups of 16. Eight neighbouring groups (4, 2 or 1, if their number is not a multiple of 8) are
// combined by a Hadamard transform, channel by channel; then three such blocks by the reflection I - 2/3. Both matrices are
// symmetric and orthogonal up to the factor sqrt(mixed_groups), so (x M) (W M)^T = mixed_groups x W^T.

constexpr int kMixedChannels = 16;

TR_INLINE int mixed_groups(int n) {
    const int groups = n / kMixedChannels;
    return groups % 8 == 0 ? 8 : groups % 4 == 0 ? 4 : groups % 2 == 0 ? 2 : 1;
}

template <int groups>
TR_INLINE void hadamard(const float* row, int n, float* to) {
    for (int from = 0; from < n; from += groups * kMixedChannels)
        for (int c = from; c < from + kMixedChannels; c += W) {
            F x[groups];
            for (int g = 0; g < groups; ++g) x[g] = load(row + c + g * kMixedChannels);
            for (int bit = 1; bit < groups; bit *= 2)
                for (int g = 0; g < groups; ++g)
                    if (!(g & bit)) {
                        const F a = x[g], b = x[g + bit];
                        x[g] = a + b, x[g + bit] = a - b;
                    }
            for (int g = 0; g < groups; ++g) store(to + c + g * kMixedChannels, x[g]);
        }
}

// row (n,) -> to (n,); n is a multiple of 16.
TR_INLINE void mix(const float* row, int n, float* to) {
    const int groups = mixed_groups(n), size = groups * kMixedChannels;
    if (groups == 8) hadamard<8>(row, n, to);
    else if (groups == 4) hadamard<4>(row, n, to);
    else if (groups == 2) hadamard<2>(row, n, to);
    else hadamard<1>(row, n, to);
    if (n / size % 3 != 0) return;
    for (int from = 0; from < n; from += 3 * size)
        for (int c = from; c < from + size; c += W) {
            const F x = load(to + c), y = load(to + c + size), z = load(to + c + 2 * size);
            const F shift = (x + y + z) * set(2.0f / 3.0f);
            store(to + c, x - shift), store(to + c + size, y - shift), store(to + c + 2 * size, z - shift);
        }
}
