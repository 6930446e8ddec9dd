// Float keys and values as the float matrix product wants them (kernels.h, Linear): [D][32 keys] and [32 keys][32].

TR_INLINE void pack_keys(const float* k, int D, int rows, float* panel) {
    for (int c = 0; c < D; ++c)
        for (int j = 0; j < kPanel; ++j) panel[c * kPanel + j] = j < rows ? k[j * D + c] : 0.0f;
}

TR_INLINE void pack_values(const float* v, int stride, int rows, float* panel) {
    for (int j = 0; j < kTile; ++j)
        for (int c = 0; c < kPanel; c += W) store(panel + j * kPanel + c, j < rows ? load(v + j * stride + c) : set(0.0f));
}

// The largest squared norm of the panel's keys, in some lane.
TR_INLINE F key_squares(const float* panel, int D) {
    F largest = set(0.0f);
    for (int j = 0; j < kPanel; j += W) {
        F sum = set(0.0f);
        for (int c = 0; c < D; ++c) sum = fma(load(panel + c * kPanel + j), load(panel + c * kPanel + j), sum);
        largest = vmax(largest, sum);
    }
    return largest;
}
