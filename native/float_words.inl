// Names of attention for instruction sets with float attention only: a word is one float, values are used in place.

constexpr float kDeep = 0.0f;
template <bool, int N> TR_INLINE void exp2_words(const F (&)[N], const F (&)[N], F (&)[N], F (&)[N]) {}
template <class E> TR_INLINE F to_word(F, F value) { return value; }
template <class E> TR_INLINE F add_squares(F words, F sum) { return fma(words, words, sum); }
TR_INLINE const float* pair_values(const float* v, int, int, float*) { return v; }
