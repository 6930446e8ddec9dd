// Rows of a matrix product in parts whose accumulators fit the registers, each part compiled for its row count.

template <int... i> struct Indices {};
template <int n, int... i> struct MakeIndices : MakeIndices<n - 1, n - 1, i...> {};
template <int... i> struct MakeIndices<0, i...> { using type = Indices<i...>; };

// Calls part(from, Indices<0 .. count-1>) for equal parts of at most `most` rows.
template <int most, class Part>
TR_INLINE void in_parts(int rows, const Part& part) {
    const int parts = (rows + most - 1) / most, size = (rows + parts - 1) / parts;
    for (int from = 0; from < rows; from += size) {
        const int count = rows - from < size ? rows - from : size;
        if constexpr (most > 6) {
            switch (count) {
                case 12: part(from, typename MakeIndices<12>::type{}); continue;
                case 11: part(from, typename MakeIndices<11>::type{}); continue;
                case 10: part(from, typename MakeIndices<10>::type{}); continue;
                case 9: part(from, typename MakeIndices<9>::type{}); continue;
                case 8: part(from, typename MakeIndices<8>::type{}); continue;
                case 7: part(from, typename MakeIndices<7>::type{}); continue;
                default: break;
            }
        }
        switch (count) {
            case 6: part(from, typename MakeIndices<6>::type{}); break;
            case 5: part(from, typename MakeIndices<5>::type{}); break;
            case 4: part(from, typename MakeIndices<4>::type{}); break;
            case 3: part(from, typename MakeIndices<3>::type{}); break;
            case 2: part(from, typename MakeIndices<2>::type{}); break;
            default: part(from, typename MakeIndices<1>::type{});
        }
    }
}
