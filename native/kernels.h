// The contract between the engine (schedule, threads, memory: instruction-set neutral) and the kernels
// (arithmetic: one translation unit per instruction set, see kernels.inl and isa_*.cpp).
//
// Dimension letters as in turborank/types.py: P pairs, T tokens, n tokens of a pair, L layers, H heads,
// D head size, C = H*D hidden size, F intermediate size.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <vector>

// Inline functions of this header are compiled by files with different target flags; they must leave no
// out-of-line copy, or the linker could keep the one that only a newer processor can run.
#if defined(_MSC_VER)
#define TR_INLINE __forceinline
#else
#define TR_INLINE inline __attribute__((always_inline))
#endif

namespace turborank {

TR_INLINE int round_up(int n, int to) { return (n + to - 1) / to * to; }

struct bf16 {
    uint16_t bits;
};

constexpr int kPanel = 32;       // output columns that a matrix product computes together
constexpr int kTile = 32;        // token rows: tasks, key ranges and the largest tile of queries are counted in these
constexpr int kSlackRows = 32;   // readable rows behind the last one of every row-major operand
constexpr int kMostHeads = 256;  // 8,192 channels, at least 32 a head
constexpr int kKeyChunk = 128;   // keys whose probabilities and values stay in the first-level cache
constexpr float kSkipLog2 = -19.93156857f;  // log2(1e-6): relative mass that block skipping may drop on each side

// Zeroed memory that only grows. Large buffers lie on huge pages where the system has them.
class Buffer {
public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    Buffer(Buffer&& other) noexcept : data_(other.data_), size_(other.size_) { other.data_ = nullptr, other.size_ = 0; }
    ~Buffer() { release(); }

    void reserve(size_t bytes);  // throws std::bad_alloc; the contents are lost when the buffer grows
    template <class T>
    TR_INLINE T* as() const { return static_cast<T*>(data_); }
    size_t size() const { return size_; }

private:
    void release();
    void* data_ = nullptr;
    size_t size_ = 0;
};

enum class Stored { f32, f16, bf16, i8 };

struct Shape {
    int vocab = 0, types = 0, positions = 0, position_offset = 0, max_length = 0;
    int C = 0, L = 0, H = 0, D = 0, F = 0;
    float eps = 0;
    bool geglu = false, cosine = false, alibi = false;
    bool gelu_head = false;  // between the two linears of a classifier's head; else tanh
    bool prenorm = false;    // ModernBERT: norms before attention and feed-forward, RoPE, a norm behind all layers and in the head
    bool mean = false;       // a prenorm model's head reads the mean of all rows; else the first
    int window = 0;          // keys to each side that a row of a sliding layer attends to
    int relative = 0;        // rows of the tables of relative positions (DeBERTa), a multiple of 32; 0: none
    int passage = 0;  // tokens that the cosine head weighs together; 0: all tokens weigh the same
    Stored stored = Stored::f32;  // word embeddings stay as the checkpoint has them; rows are widened when they are read
    // How the left sides of int8 products are rounded: Linear::mixed of qkv and up, Linear::least of down.
    bool mixed = false;
    float least = 0;

    // Whether the last layer's attention is attend_first(): of one row, whose scores are plain products with x.
    bool keyless_last() const { return !cosine && !prenorm && relative == 0; }
    int whole_layers() const { return cosine || mean ? L : L - 1; }  // layers that every row goes through
};

// y = x W^T + b, W packed in panels of 32 output columns; `depth` is `in` rounded up with zero weights. A panel is
//   [depth / g][32 columns][g]                                       or, for matrix tiles,
//   [depth / (16 g)][2 halves of the columns][16][16 columns][g]     1 KiB for each tile of 16 words x 16 columns
// where a word of g neighbours along the depth is what an instruction takes at once: 1 float, 2 bf16, and of int8 as
// many as Kernels::int8_group says. Panels of int8 end with 32 int32: where each column's sum of products begins.
struct Linear {
    int in = 0, out = 0, depth = 0;
    size_t panel_bytes = 0;
    const std::byte* panels = nullptr;
    const float* scale = nullptr;  // (out,) int8 only: W[c] = scale[c] * int8 row
    const float* bias = nullptr;   // (out,) in packed column order
    // How rows of the left side become int8. `mixed`: by mix.inl, as W's have been. `least`: they lie above it, and from
    // there to their largest value all 256 steps are used; 0: to both sides of zero alike.
    bool mixed = false;
    float least = 0.0f;
    TR_INLINE const std::byte* panel(int p) const { return panels + panel_bytes * static_cast<size_t>(p); }
};

struct Norm {  // weight null: none
    const float *weight = nullptr, *bias = nullptr;
};

// A projection's weights as they were, row by row (C, C): int8, bf16 or float as the precision is.
struct Rows {
    const void* weights = nullptr;
    const float *scale = nullptr, *bias = nullptr;
};

// What disentangled attention (architectures/deberta.py) adds to the scores of one head, in the element type of q, k and v:
// score[i][j] = q_i . k_j + q_i . keys[row] + queries[row] . k_j, where row = rows[i - j].
struct Relative {
    const void* keys = nullptr;     // (count, D)
    const void* queries = nullptr;  // (count, D) as panels of 32 rows; they carry the factor that q carries
    float longest_key = 0, longest_query = 0;  // largest norm of a row
    const int32_t* rows = nullptr;  // by i - j; neighbours differ by 0 or 1, and it goes on kSlackDistances beyond the longest pair
    int count = 0;
};
constexpr int kSlackDistances = 128;

struct Layer {
    Linear qkv;   // columns q, k, v; q carries log2(e)/sqrt(D), so scores are in log2 units. With RoPE a head's columns of q and
                  // of k are Kernels::lanes of its first half, then those of its second half that turn with them, and so on
    Rows keys, values;   // of a classifier's last layer whose scores need no keys (attend_first); its qkv has the columns of q alone
    const std::byte *relative_keys = nullptr, *relative_queries = nullptr;  // (H, relative, D)
    const float* relative_longest = nullptr;                                // (H, 2)
    Linear out;
    Linear up;    // GEGLU: Kernels::lanes gate columns, then as many value columns that belong to them, and so on
    Linear down;
    Norm norm1, norm2;
    const float* rope = nullptr;  // (max_length, 2, D / 2) cosines and sines of a position's angles
    int window = 0;               // as in Shape; 0: all keys
};

struct Weights {
    Shape shape;
    const std::byte* words = nullptr;
    const float* word_scale = nullptr;  // (vocab,) where they are int8
    const float *types = nullptr, *positions = nullptr;
    const float* slopes = nullptr;  // (H,) in log2 units; zero without ALiBi
    const int32_t* relative_rows = nullptr;  // Relative::rows
    Norm embedding_norm, final_norm, head_norm;
    std::vector<Layer> layers;
    Linear pooler;  // float panels, whatever the precision
    const float* head = nullptr;  // the classifier's (C,) and its bias; or the cosine's scale, bias and focus
};

// Where a thread's time goes; a matrix product counts with what is fused into it.
enum Part { kEmbed, kQuantise, kQkv, kAttention, kOut, kUp, kDown, kNorm, kHead, kParts };
constexpr const char* kPartNames[kParts] = {"embed", "quantise", "qkv", "attention", "out", "up", "down", "norm", "head"};

uint64_t nanoseconds();  // of a steady clock

// Per-thread memory of the kernels. Sizes are for the widest element any kernel uses (4 bytes).
struct Scratch {
    uint64_t spent[kParts] = {};  // nanoseconds
    Buffer operand;  // rows of a matrix product's left side: (block + slack, depth)
    Buffer row_scale;
    Buffer mixed;    // (depth,)
    Buffer low, starts;  // of fine rows: (block, 32) products; (block,) pointers, see Operand
    Buffer hidden;   // (block + slack, F)
    Buffer tiles;    // two raw 32 x 32 results
    Buffer queries, values, bias, probabilities, context;  // attention
    Buffer asked, weights;  // attend_first(): (H, C), (H, longest)
    Buffer normed;          // (C,)
    Buffer key_norms;       // attention_window.inl: (longest / 32,)
    Buffer relative_queries, relative_keys, skewed;  // attention_relative.inl

    void reserve(const Shape& s, int block_rows, int longest);
};

// One (pair, head) and a range of its queries. q, k, v point at the pair's first row of that head, rows D apart.
struct AttendJob {
    const void *q, *k, *v;
    void* out;        // the pair's first row at the head's first column, rows `out_stride` elements apart
    int out_stride;
    int n, from, to;  // from is a multiple of 32
    int D;
    bool alibi;
    float slope;      // in log2 units
    int window;       // keys to each side; 0: all
    Relative relative;  // count 0: none
};

// Where the rows of q, k and v go: element (t, c) of each is at [(c / D * capacity + t) * D + c % D].
struct Heads {
    void *q, *k, *v;
    int capacity;
};

enum class Precision { int8, bf16, fp32 };

// Which columns of a layer's qkv: a classifier's last layer needs keys and values of all rows, queries of the first alone.
enum class Columns { all, queries, keys_and_values };

// All functions are re-entrant. `x` is (rows, C) float; q, k, v and the attention output are float or bf16, whichever the
// table says. A row's result depends on that row (and, in attention, its pair) alone. `types` (rows,) may be null; where
// they are given, rows of type 0 become int8 more finely (kernels.inl, put_operands).
struct Kernels {
    Precision precision;     // of the weights
    const char* gemm;        // the matrix product's instruction, for reports and tests
    size_t exchange_bytes;   // 2: q, k, v, attention output and hidden are bf16; 4: float
    bool tiles;              // int8 and bf16 weights lie in matrix tiles (see Linear)
    int int8_group;          // int8 weights of one column that lie side by side
    int int8_offset;         // what is added to int8 activations where they are stored
    int lanes;               // floats of a vector (see Layer::up)
    int row_tile, lowest_tile;  // rows that a product computes together: usually, at least
    int block_rows;          // rows that go through the feed-forward together: what the caches hold
    void (*enter)();         // once per thread and call, before the others: tile configuration
    void (*leave)();
    void (*embed)(const Weights&, const int32_t* ids, const int32_t* types, const int32_t* positions, int rows, float* x, Scratch&);
    // The qkv product for `rows` rows that stand at row `at` of the heads.
    void (*project_heads)(const Shape&, const Layer&, Columns, const float* x, const int32_t* types, const int32_t* positions, int rows, Heads, int at,
                          Scratch&);
    void (*attend)(const AttendJob&, Scratch&);
    // A classifier's last layer where scores depend on no position, or on it alone: the attention output (C,) of the first of a pair's n rows.
    void (*attend_first)(const Weights&, const float* x, int n, void* out, Scratch&);
    // Attention output to the layer's output, in place on x: out + residual + norm, feed-forward + residual + norm.
    void (*finish_layer)(const Shape&, const Layer&, const void* attention, float* x, const int32_t* types, int rows, Scratch&);
    // The mean (C,) of a pair's n rows, each behind the norm that follows the layers.
    void (*average)(const Weights&, const float* x, int n, float* out, Scratch&);
    void (*classify)(const Weights&, const float* first, int rows, float* logits, Scratch&);
    float (*cosine)(const Weights&, const float* x, const int32_t* types, int n, Scratch&);
};

// kAvx2: with FMA and F16C. kVnni: AVX-512 F, DQ, BW, VL and VNNI. kVnni256: vpdpbusd of 256 bits, in the encoding of AVX-VNNI
// (kAvxVnni) or of AVX-512.
enum Feature : unsigned {
    kAvx2 = 1, kVnni = 2, kBf16 = 4, kFastBf16 = 8, kAmx = 16, kVnni256 = 32, kAvxVnni = 64,
    kArmDot = 256, kArmI8mm = 512, kArmBf16 = 1024,
};

// One row of the instruction-set table. `kernels` gives null where the row has no such precision.
struct IsaRow {
    const char* name;
    unsigned needs;  // features
    const Kernels* (*kernels)(Precision, unsigned features);
};

unsigned detect_features();             // what processor and kernel allow; asks Linux for the matrix tiles once
const std::vector<IsaRow>& isa_table(); // best first; the last row needs nothing
std::string missing(const IsaRow&);     // what the row needs and this machine lacks, in words; empty where it can run

const Kernels* amx_kernels(Precision, unsigned);
const Kernels* avx512_kernels(Precision, unsigned);
const Kernels* avxvnni_kernels(Precision, unsigned);
const Kernels* avx2_kernels(Precision, unsigned);
const Kernels* armi8mm_kernels(Precision, unsigned);
const Kernels* armdot_kernels(Precision, unsigned);
const Kernels* portable_kernels(Precision, unsigned);

const Kernels* evex_kernels(Precision, unsigned);      // isa_avxvnni.cpp, for the checks without Python
const Kernels* stand_in_kernels(Precision, unsigned);

}  // namespace turborank
