// Weights as the checkpoint has them -> panels as the kernels read them (kernels.h, Linear).
#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "model.h"

namespace turborank {
namespace {

constexpr float kLog2e = 1.44269504088896341f;

bf16 to_bf16(float x) {
    const uint32_t bits = __builtin_bit_cast(uint32_t, x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16)};
}

std::string dimensions(int64_t rows, int64_t columns) {
    return rows == 1 ? "(" + std::to_string(columns) + ",)" : "(" + std::to_string(rows) + ", " + std::to_string(columns) + ")";
}

// mix.inl in single floats.
using F = float;
constexpr int W = 1;
float set(float x) { return x; }
float load(const float* p) { return *p; }
void store(float* p, float x) { *p = x; }
#include "mix.inl"

constexpr float kLeastGelu = -0.171875f;  // gelu(-0.75) is -0.16997; the fast one may be 5e-4 below

// One output column of a product: a row of a weight matrix, what to multiply it by, and its bias.
struct Column {
    const Tensor* weight;
    int64_t row;
    float factor, bias;
};

constexpr size_t kChunk = size_t{4} << 20;

class Packer {
public:
    Packer(const Tensors& tensors, const Kernels& kernels, bool fine, Packed& packed) : tensors_(tensors), kernels_(kernels), fine_(fine), packed_(packed) {}

    const Tensor& find(const std::string& name, int64_t rows, int64_t columns) const {
        const auto it = tensors_.find(name);
        if (it == tensors_.end()) throw std::invalid_argument("expected a tensor " + dimensions(rows, columns) + ", got none at " + name);
        const Tensor& t = it->second;
        if (t.rows != rows || t.columns != columns)
            throw std::invalid_argument("expected shape " + dimensions(rows, columns) + ", got " + dimensions(t.rows, t.columns) + " at " + name);
        return t;
    }
    bool has(const std::string& name) const { return tensors_.contains(name); }

    float* floats(size_t n) { return reinterpret_cast<float*>(bytes(n * sizeof(float))); }

    // Everything is laid end to end in few large buffers, so that huge pages can hold it.
    std::byte* bytes(size_t n) {
        n = (n + 63) / 64 * 64;
        if (used_ + n > (packed_.memory.empty() ? 0 : packed_.memory.back().size())) {
            packed_.memory.emplace_back().reserve(n > kChunk ? n : kChunk);
            used_ = 0;
        }
        std::byte* result = packed_.memory.back().as<std::byte>() + used_;
        used_ += n;
        return result;
    }

    const float* vector(const std::string& name, int64_t columns, int64_t rows = 1) {
        const Tensor& t = find(name, rows, columns);
        float* out = floats(static_cast<size_t>(rows * columns));
        for (int64_t r = 0; r < rows; ++r) widen(t, r, out + r * columns);
        return out;
    }

    Norm norm(const std::string& name, int C) { return {vector(name + ".weight", C), vector(name + ".bias", C)}; }

    // The columns of one linear layer of the checkpoint; a missing bias is zero.
    std::vector<Column> columns(const std::string& name, int out, int in, float factor = 1.0f) {
        const Tensor& weight = find(name + ".weight", out, in);
        std::vector<float> bias(static_cast<size_t>(out), 0.0f);
        if (has(name + ".bias")) widen(find(name + ".bias", 1, out), 0, bias.data());
        std::vector<Column> result;
        for (int r = 0; r < out; ++r) result.push_back({&weight, r, factor, bias[static_cast<size_t>(r)] * factor});
        return result;
    }

    // `mixed` and `least`: see Linear; of int8 only. Where fine rows need it less, weights that are int8 already are not
    // rounded a second time to be mixed.
    Linear linear(const std::vector<Column>& columns, Precision precision, bool mixed = false, float least = 0.0f) {
        Linear w;
        const bool as_given = fine_ && std::all_of(columns.begin(), columns.end(), [](const Column& c) { return c.weight->stored == Stored::i8; });
        w.mixed = mixed && !as_given && precision == Precision::int8, w.least = precision == Precision::int8 ? least : 0.0f;
        w.in = static_cast<int>(columns[0].weight->columns);
        w.out = static_cast<int>(columns.size());
        const size_t element = size_of(precision);
        const int group = precision == Precision::int8 ? kernels_.int8_group : precision == Precision::bf16 ? 2 : 1;
        const bool tiles = kernels_.tiles && precision != Precision::fp32;
        w.depth = (w.in + 16 * group - 1) / (16 * group) * 16 * group;
        w.panel_bytes = static_cast<size_t>(w.depth) * kPanel * element + (precision == Precision::int8 ? kPanel * sizeof(int32_t) : 0);
        std::byte* panels = bytes(w.panel_bytes * static_cast<size_t>(w.out / kPanel));
        float *scale = floats(columns.size()), *bias = floats(columns.size());
        std::vector<std::byte> row(static_cast<size_t>(w.depth) * element);
        for (int c = 0; c < w.out; ++c) {
            const Column& column = columns[static_cast<size_t>(c)];
            std::byte* panel = panels + w.panel_bytes * static_cast<size_t>(c / kPanel);
            const int j = c % kPanel;
            scale[c] = encode(column, precision, w.mixed, row.data());
            bias[c] = column.bias;
            const auto spread = [&](const auto* from) {
                for (int k = 0; k < w.depth; ++k) std::memcpy(panel + place(k, j, group, tiles) * sizeof *from, from + k, sizeof *from);
            };
            if (precision == Precision::fp32) spread(reinterpret_cast<const float*>(row.data()));
            if (precision == Precision::bf16) spread(reinterpret_cast<const bf16*>(row.data()));
            if (precision != Precision::int8) continue;
            spread(row.data());
            int32_t sum = 0;
            for (const std::byte b : row) sum += static_cast<int8_t>(b);
            bias[c] += w.least * scale[c] * static_cast<float>(sum);
            const int32_t start = (w.least != 0.0f ? 128 - kernels_.int8_offset : -kernels_.int8_offset) * sum;
            std::memcpy(panel + static_cast<size_t>(w.depth) * kPanel + static_cast<size_t>(j) * 4, &start, 4);
        }
        w.panels = panels, w.scale = scale, w.bias = bias;
        return w;
    }
    Linear linear(const std::vector<Column>& columns, bool mixed, float least = 0.0f) { return linear(columns, kernels_.precision, mixed, least); }

    Rows rows(const std::vector<Column>& columns) {
        const size_t out = columns.size(), bytes_each = static_cast<size_t>(columns[0].weight->columns) * size_of(kernels_.precision);
        std::byte* weights = bytes(out * bytes_each);
        float *scale = floats(out), *bias = floats(out);
        for (size_t r = 0; r < out; ++r) scale[r] = encode(columns[r], kernels_.precision, false, weights + r * bytes_each), bias[r] = columns[r].bias;
        return {weights, scale, bias};
    }

private:
    static void widen(const Tensor& t, int64_t row, float* out) {
        const size_t from = static_cast<size_t>(row * t.columns);
        for (int64_t c = 0; c < t.columns; ++c) {
            const size_t at = from + static_cast<size_t>(c);
            out[c] = t.stored == Stored::f32   ? static_cast<const float*>(t.data)[at]
                     : t.stored == Stored::f16 ? half_to_float(static_cast<const uint16_t*>(t.data)[at])
                     : t.stored == Stored::bf16 ? to_float(static_cast<const bf16*>(t.data)[at])
                                               : static_cast<float>(static_cast<const int8_t*>(t.data)[at]) * t.scale[row];
        }
    }

    static size_t size_of(Precision precision) { return precision == Precision::int8 ? 1 : precision == Precision::bf16 ? 2 : 4; }

    // A column's weights (in,) as the precision's type; returns what to multiply them by. int8 is symmetric, and rows that are
    // int8 already and not to be mixed are taken as they are.
    static float encode(const Column& column, Precision precision, bool mixed, std::byte* out) {
        const Tensor& t = *column.weight;
        const size_t n = static_cast<size_t>(t.columns);
        if (precision == Precision::int8 && t.stored == Stored::i8 && !mixed) {
            std::memcpy(out, static_cast<const int8_t*>(t.data) + column.row * t.columns, n);
            return t.scale[column.row] * column.factor;
        }
        std::vector<float> row(n);
        widen(t, column.row, row.data());
        if (precision != Precision::int8) {
            for (size_t k = 0; k < n; ++k) {
                if (precision == Precision::fp32) reinterpret_cast<float*>(out)[k] = row[k] * column.factor;
                else reinterpret_cast<bf16*>(out)[k] = to_bf16(row[k] * column.factor);
            }
            return 1.0f;
        }
        if (mixed) mix(row.data(), static_cast<int>(n), row.data());
        float largest = 0.0f;
        for (const float v : row) largest = std::fabs(v) > largest ? std::fabs(v) : largest;
        const float inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
        for (size_t k = 0; k < n; ++k) out[k] = static_cast<std::byte>(static_cast<int8_t>(std::nearbyint(row[k] * inverse)));
        return largest / 127.0f / static_cast<float>(mixed ? mixed_groups(static_cast<int>(n)) : 1) * column.factor;
    }

    // Where in a panel, in elements: see Linear.
    static size_t place(int k, int column, int group, bool tiles) {
        const int word = k / group, tile = word / 16 * 2 + column / 16;
        const int at = tiles ? (tile * 16 + word % 16) * 16 + column % 16 : word * kPanel + column;
        return static_cast<size_t>(at * group + k % group);
    }

    const Tensors& tensors_;
    const Kernels& kernels_;
    const bool fine_;  // some rows are rounded to int8 more finely, see put_operands
    Packed& packed_;
    size_t used_ = 0;
};

void append(std::vector<Column>& to, const std::vector<Column>& more) { to.insert(to.end(), more.begin(), more.end()); }

// `first`: only the first row of this layer's output is needed.
Layer pack_layer(Packer& p, const Shape& s, const std::string& name, int lanes, bool first) {
    Layer layer;
    auto qkv = p.columns(name + ".attention.self.query", s.C, s.C, kLog2e / std::sqrt(static_cast<float>(s.D)));
    const auto keys = p.columns(name + ".attention.self.key", s.C, s.C), values = p.columns(name + ".attention.self.value", s.C, s.C);
    if (first) layer.keys = p.rows(keys), layer.values = p.rows(values);
    else append(qkv, keys), append(qkv, values);
    layer.qkv = p.linear(qkv, true);
    layer.out = p.linear(p.columns(name + ".attention.output.dense", s.C, s.C), false);
    layer.norm1 = p.norm(name + ".attention.output.LayerNorm", s.C);
    if (s.geglu) {
        const auto gated = p.columns(name + ".mlp.gated_layers", 2 * s.F, s.C);
        std::vector<Column> turns;
        for (int f = 0; f < s.F; f += lanes)
            for (const int half : {0, s.F}) turns.insert(turns.end(), gated.begin() + half + f, gated.begin() + half + f + lanes);
        layer.up = p.linear(turns, true);
        layer.down = p.linear(p.columns(name + ".mlp.wo", s.C, s.F), false);
        layer.norm2 = p.norm(name + ".mlp.layernorm", s.C);
    } else {
        layer.up = p.linear(p.columns(name + ".intermediate.dense", s.F, s.C), true);
        layer.down = p.linear(p.columns(name + ".output.dense", s.C, s.F), false, kLeastGelu);
        layer.norm2 = p.norm(name + ".output.LayerNorm", s.C);
    }
    return layer;
}

}  // namespace

std::unique_ptr<Packed> pack(const Shape& shape, const std::vector<float>& slopes, const Tensors& tensors, const Kernels& kernels) {
    auto packed = std::make_unique<Packed>();
    Packer p(tensors, kernels, shape.cosine, *packed);
    Weights& w = packed->weights;
    w.shape = shape;
    Shape& s = w.shape;
    const Tensor& words = p.find("embeddings.word_embeddings.weight", s.vocab, s.C);
    w.words = {words.stored, words.data, words.scale};
    if (s.types > 0) w.types = p.vector("embeddings.token_type_embeddings.weight", s.C, s.types);
    const std::string positions = "embeddings.position_embeddings.weight";
    if (p.has(positions)) s.positions = static_cast<int>(tensors.at(positions).rows), w.positions = p.vector(positions, s.C, s.positions);
    w.embedding_norm = p.norm("embeddings.LayerNorm", s.C);
    for (int l = 0; l < s.L; ++l) w.layers.push_back(pack_layer(p, s, "encoder.layer." + std::to_string(l), kernels.lanes, !s.cosine && l == s.L - 1));
    if (s.cosine) {
        w.cosine_scale = *p.vector("head.scale", 1);
        w.cosine_bias = *p.vector("head.bias", 1);
        if (s.passage > 0) w.cosine_focus = *p.vector("head.focus", 1);
    } else {
        const bool roberta = p.has("classifier.dense.weight");  // XLM-R names for the same head
        w.pooler = p.linear(p.columns(roberta ? "classifier.dense" : "pooler.dense", s.C, s.C), Precision::fp32);
        const std::string last = roberta ? "classifier.out_proj" : "classifier";
        w.classifier = p.vector(last + ".weight", s.C);
        w.classifier_bias = *p.vector(last + ".bias", 1);
    }
    s.alibi = !slopes.empty();
    float* log2_slopes = p.floats(static_cast<size_t>(s.H));
    w.slopes = log2_slopes;
    for (const float slope : slopes) *log2_slopes++ = slope * kLog2e;
    return packed;
}

}  // namespace turborank
