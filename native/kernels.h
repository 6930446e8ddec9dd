// The interface between the engine (schedule, threads, memory; independent of the instruction set) and the kernels
// (arithmetic; one translation unit for each instruction set, see kernels.inl and isa_*.cpp). See docs/kernels.md.
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

// Files with different target flags compile the inline functions of this header. They must leave no out-of-line copy:
// the linker keeps one of several copies, and that could be one that an older processor cannot run.
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

constexpr int kPanel = 32;       // output columns of a panel of weights
constexpr int kTile = 32;        // token rows: unit of tasks and key ranges, and the largest tile of queries
constexpr int kSlackRows = 32;   // readable rows after the last one of every row-major operand
constexpr int kMostHeads = 256;  // maximum of heads: 8,192 channels, at least 32 for each head
constexpr int kKeyChunk = 128;   // keys whose probabilities and values fit the first-level cache
constexpr float kSkipLog2 = -19.93156857f;  // log2(1e-6): share of a row's softmax sum that skipping may lose on each side

// Zeroed memory that only grows. Large buffers use huge pages where available.
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
    int vocab = 0, types = 0, positions = 0, position_offset = 0, repeat_from = 0, max_length = 0;
    int C = 0, L = 0, H = 0, D = 0, F = 0;
    float eps = 0;
    bool geglu = false, alibi = false;
    bool cosine = false;     // the head is a cosine of means over the last states
    bool sum = false;        // a classifier, and the cosine over the states before the last layer
    bool gelu_head = false;  // activation between the two linears of a classifier head: GELU, else tanh
    bool prenorm = false;    // ModernBERT: norms before attention and feed-forward, RoPE, a final norm and a norm in the head
    bool mean = false;       // the head of a prenorm model reads the mean of all rows, else the first row
    int window = 0;          // keys to each side that a row of a sliding layer attends to
    int relative = 0;        // rows of the relative position tables (DeBERTa), a multiple of 32; 0: none
    int passage = 0;  // tokens of a passage of the focus head; 0: all tokens have the same weight
    Stored stored = Stored::f32;  // type of the word embeddings in the checkpoint; rows are converted when they are read
    // How activations of int8 products are rounded: Linear::mixed of qkv and up, Linear::least of down.
    bool mixed = false;
    float least = 0;

    // The row of the position table for the t-th token of a pair (docs/model.md, 3.1).
    int row_of(int t) const {
        return repeat_from == 0 || t < positions ? t + position_offset : repeat_from + (t - repeat_from) % (positions - repeat_from);
    }
    // Whether the last layer's attention is attend_first(): of the first row only, without keys and values.
    bool keyless_last() const { return !cosine && !prenorm && relative == 0; }
    bool has_cosine() const { return cosine || sum; }  // whether the head reads the means of both types of rows
    int whole_layers() const { return cosine || mean ? L : L - 1; }  // layers that are computed for every row
};

// y = x W^T + b, with W packed in panels of 32 output columns. `depth` is `in` padded with zero weights. A panel is
//   [depth / g][32 columns][g]                                       or, for matrix tiles,
//   [depth / (16 g)][2 halves of the columns][16][16 columns][g]     1 KiB for each tile of 16 words x 16 columns
// where a word is the g neighbours along the depth that one instruction multiplies: 1 float, 2 bf16 or
// Kernels::int8_group int8. A panel of int8 ends with 32 int32, the initial sums of its columns.
struct Linear {
    int in = 0, out = 0, depth = 0;
    size_t panel_bytes = 0;
    const std::byte* panels = nullptr;
    const float* scale = nullptr;  // (out,) int8 only: W[c] = scale[c] * int8 column c
    const float* bias = nullptr;   // (out,) in packed column order
    // How rows of the left side become int8. `mixed`: mixed by mix.inl first, as W's rows were. `least`: a lower bound of
    // their values, so that all 256 steps lie between it and the row's maximum; 0: symmetric around zero.
    bool mixed = false;
    float least = 0.0f;
    TR_INLINE const std::byte* panel(int p) const { return panels + panel_bytes * static_cast<size_t>(p); }
};

struct Norm {  // weight null: no norm
    const float *weight = nullptr, *bias = nullptr;
};

// A projection's weights (C, C), row-major instead of in panels, in the type of the precision.
struct Rows {
    const void* weights = nullptr;
    const float *scale = nullptr, *bias = nullptr;
};

// Tables of disentangled attention (architectures/deberta.py) for one head, in the element type of q, k and v:
// score[i][j] = q_i . k_j + q_i . keys[row] + queries[row] . k_j, where row = rows[i - j].
struct Relative {
    const void* keys = nullptr;     // (count, D)
    const void* queries = nullptr;  // (count, D) as panels of 32 rows; multiplied by the same factor as q
    float longest_key = 0, longest_query = 0;  // largest norm of a row
    const int32_t* rows = nullptr;  // by i - j, kSlackDistances beyond the longest pair to each side; neighbours differ by 0 or 1
    int count = 0;
};
constexpr int kSlackDistances = 128;

struct Layer {
    Linear qkv;   // columns q, k, v; q is multiplied by log2(e)/sqrt(D), so scores are in log2 units. With RoPE, columns of q and
                  // k alternate within a head: Kernels::lanes of its first half, then the channels they are rotated with
    Rows keys, values;   // of the last layer if it uses attend_first(); its qkv then has the columns of q only
    const std::byte *relative_keys = nullptr, *relative_queries = nullptr;  // (H, relative, D)
    const float* relative_longest = nullptr;                                // (H, 2)
    Linear out;
    Linear up;    // GEGLU: alternately Kernels::lanes gate columns and the value columns that belong to them
    Linear down;
    Norm norm1, norm2;
    const float* rope = nullptr;  // (max_length, 2, D / 2) cosines and sines of each position's angles
    int window = 0;               // as in Shape; 0: all keys
};

struct Weights {
    Shape shape;
    const std::byte* words = nullptr;
    const float* word_scale = nullptr;  // (vocab,) if word embeddings are int8
    const float *types = nullptr, *positions = nullptr;
    const float* slopes = nullptr;  // (H,) in log2 units; zeros without ALiBi
    const int32_t* relative_rows = nullptr;  // Relative::rows
    Norm embedding_norm, final_norm, head_norm;
    std::vector<Layer> layers;
    Linear pooler;  // float panels in every precision
    const float* head = nullptr;        // classifier: weights (C,) and bias
    const float* similarity = nullptr;  // cosine: scale, bias and focus
};

// Parts of the work for which time is counted. A matrix product includes the operations fused into it.
enum Part { kEmbed, kQuantise, kQkv, kAttention, kOut, kUp, kDown, kNorm, kHead, kParts };
constexpr const char* kPartNames[kParts] = {"embed", "quantise", "qkv", "attention", "out", "up", "down", "norm", "head"};

uint64_t nanoseconds();  // of a steady clock

// Memory of one thread's kernels. Sizes are for the widest element of any kernel (4 bytes).
struct Scratch {
    uint64_t spent[kParts] = {};  // nanoseconds
    Buffer operand;  // rows of a matrix product's left side: (block + slack, depth)
    Buffer row_scale;
    Buffer mixed;    // (depth,)
    Buffer low, starts;  // two-term rows: (block, 32) products of residuals; (block,) pointers, see Operand
    Buffer hidden;   // (block + slack, F)
    Buffer tiles;    // two raw 32 x 32 results
    Buffer queries, values, bias, probabilities, context;  // attention
    Buffer asked, weights;  // attend_first(): (H, C), (H, longest)
    Buffer normed;          // (C,)
    Buffer key_norms;       // attention_window.inl: (longest / 32,)
    Buffer relative_queries, relative_keys, skewed;  // attention_relative.inl

    void reserve(const Shape& s, int block_rows, int longest);
};

// One (pair, head) and a range of its queries. q, k, v point to the pair's first row of that head; rows are D apart.
struct AttendJob {
    const void *q, *k, *v;
    void* out;        // the pair's first row at the head's first column; rows are `out_stride` elements apart
    int out_stride;
    int n, from, to;  // from is a multiple of 32
    int D;
    bool alibi;
    float slope;      // in log2 units
    int window;       // keys to each side; 0: all
    Relative relative;  // count 0: none
};

// Destination of the rows of q, k and v: element (t, c) of each is at [(c / D * capacity + t) * D + c % D].
struct Heads {
    void *q, *k, *v;
    int capacity;
};

enum class Precision { int8, bf16, fp32 };

// Columns of a layer's qkv to compute: a classifier's last layer needs keys and values of all rows, queries of first rows only.
enum class Columns { all, queries, keys_and_values };

// All functions are re-entrant. `x` is (rows, C) float; q, k, v and the attention output are float or bf16, see
// exchange_bytes. A row's result depends only on that row and, in attention, on its pair. `types` (rows,) may be null; if
// given, rows of type 0 use two-term int8 (kernels.inl, put_operands).
struct Kernels {
    Precision precision;     // of the weights
    const char* gemm;        // instruction of the matrix product, for reports and tests
    size_t exchange_bytes;   // bytes of an element of q, k, v, attention output and hidden: 2 is bf16, 4 is float
    bool tiles;              // int8 and bf16 weights are packed for matrix tiles (see Linear)
    int int8_group;          // int8 weights of one column in a word
    int int8_offset;         // added to int8 activations when they are stored; 64: they have 7 bits
    int lanes;               // floats in a vector (see Layer::up)
    int row_tile, lowest_tile;  // rows of the usual and of the smallest tile of a product
    int block_rows;          // rows that go through the feed-forward together; chosen by the size of the caches
    void (*enter)();         // called once for each thread and call, before the others: configures matrix tiles
    void (*leave)();
    void (*embed)(const Weights&, const int32_t* ids, const int32_t* types, const int32_t* positions, int rows, float* x, Scratch&);
    // The qkv product of `rows` rows, written from row `at` of the heads on.
    void (*project_heads)(const Shape&, const Layer&, Columns, const float* x, const int32_t* types, const int32_t* positions, int rows, Heads, int at,
                          Scratch&);
    void (*attend)(const AttendJob&, Scratch&);
    // The last layer of a classifier with plain or ALiBi attention: attention output (C,) of the first of a pair's n rows.
    void (*attend_first)(const Weights&, const float* x, int n, void* out, Scratch&);
    // From the attention output to the layer's output, in place on x: out + residual + norm, feed-forward + residual + norm.
    void (*finish_layer)(const Shape&, const Layer&, const void* attention, float* x, const int32_t* types, int rows, Scratch&);
    // The mean (C,) of a pair's n rows after the final norm.
    void (*average)(const Weights&, const float* x, int n, float* out, Scratch&);
    void (*classify)(const Weights&, const float* first, int rows, float* logits, Scratch&);
    float (*cosine)(const Weights&, const float* x, const int32_t* types, int n, Scratch&);
};

// kAvx2: AVX2, FMA and F16C. kVnni: AVX-512 F, DQ, BW, VL and VNNI. kVnni256: vpdpbusd of 256 bits, in the encoding of
// AVX-VNNI (kAvxVnni) or of AVX-512.
enum Feature : unsigned {
    kAvx2 = 1, kVnni = 2, kBf16 = 4, kFastBf16 = 8, kAmx = 16, kVnni256 = 32, kAvxVnni = 64,
    kArmDot = 256, kArmI8mm = 512, kArmBf16 = 1024,
};

// One row of the instruction-set table. `kernels` returns null if the row lacks the precision.
struct IsaRow {
    const char* name;
    unsigned needs;  // features
    const Kernels* (*kernels)(Precision, unsigned features);
};

unsigned detect_features();             // features that processor and operating system allow; requests matrix tiles once
const std::vector<IsaRow>& isa_table(); // best first; the last row needs no feature
std::string missing(const IsaRow&);     // the features that the row needs and this machine lacks, in words; empty if it can run

const Kernels* amx_kernels(Precision, unsigned);
const Kernels* avx512_kernels(Precision, unsigned);
const Kernels* avxvnni_kernels(Precision, unsigned);
const Kernels* avx2_kernels(Precision, unsigned);
const Kernels* avx2_seven_kernels(Precision, unsigned);  // isa_avx2.cpp, `seven`
const Kernels* armi8mm_kernels(Precision, unsigned);
const Kernels* armdot_kernels(Precision, unsigned);
const Kernels* portable_kernels(Precision, unsigned);

const Kernels* evex_kernels(Precision, unsigned);      // isa_avxvnni.cpp, for the checks without Python
const Kernels* stand_in_kernels(Precision, unsigned);

}  // namespace turborank
