// Packed arrays by name, made by turborank/engines/native_weights.py -> Weights. Nothing is copied.
#include <stdexcept>

#include "model.h"

namespace turborank {

Weights weights_of(const Shape& s, const Arrays& arrays, const Kernels& kernels) {
    const auto find = [&](const std::string& name, size_t bytes) {
        const auto it = arrays.find(name);
        const size_t got = it == arrays.end() ? 0 : it->second.size();
        if (got != bytes) throw std::invalid_argument("expected " + std::to_string(bytes) + " bytes, got " + std::to_string(got) + " at " + name);
        return it->second.data();
    };
    const auto floats = [&](const std::string& name, int n) { return reinterpret_cast<const float*>(find(name, static_cast<size_t>(n) * 4)); };
    const auto norm = [&](const std::string& name) -> Norm { return {floats(name + ".weight", s.C), floats(name + ".bias", s.C)}; };
    const auto size_of = [](Precision p) { return p == Precision::int8 ? 1 : p == Precision::bf16 ? 2 : 4; };
    const auto linear = [&](const std::string& name, int in, int out, Precision p, bool mixed = false, float least = 0.0f) {
        const int words = 16 * (p == Precision::int8 ? kernels.int8_group : 4 / size_of(p)), depth = round_up(in, words);
        const size_t bytes = static_cast<size_t>(depth * size_of(p) + (p == Precision::int8 ? 4 : 0)) * kPanel;
        const std::byte* panels = find(name + ".panels", bytes * static_cast<size_t>(out / kPanel));
        if (reinterpret_cast<uintptr_t>(panels) % 64) throw std::invalid_argument("expected whole cache lines at " + name);
        return Linear{in, out, depth, bytes, panels, floats(name + ".scale", out), floats(name + ".bias", out), mixed, least};
    };
    const auto rows = [&](const std::string& name) -> Rows {
        return {find(name + ".rows", static_cast<size_t>(s.C * s.C * size_of(kernels.precision))), floats(name + ".scale", s.C), floats(name + ".bias", s.C)};
    };
    Weights w;
    w.shape = s;
    const bool scaled = s.stored == Stored::i8;
    w.words = find("words", static_cast<size_t>(s.vocab) * static_cast<size_t>(s.C) * (scaled ? 1 : s.stored == Stored::f32 ? 4 : 2));
    if (scaled) w.word_scale = floats("words.scale", s.vocab);
    if (s.types > 0) w.types = floats("types", s.types * s.C);
    if (s.repeat_from < 0 || (s.repeat_from > 0 && s.repeat_from >= s.positions)) throw std::invalid_argument("expected repeat_from below positions");
    if (s.positions > 0) w.positions = floats("positions", s.positions * s.C);
    w.slopes = floats("slopes", s.H);
    if (s.relative > 0) {
        const int beyond = s.max_length + kSlackDistances;  // to either side of distance 0
        w.relative_rows = reinterpret_cast<const int32_t*>(floats("relative.rows", 2 * beyond + 1)) + beyond;
        for (int d = -beyond; d <= beyond; ++d) {
            const int row = w.relative_rows[d], step = d < beyond ? w.relative_rows[d + 1] - row : 0;
            if (row < 0 || row >= s.relative || step < 0 || step > 1) throw std::invalid_argument("expected neighbouring rows at relative.rows");
        }
    }
    w.embedding_norm = norm("norm");
    const float* rope[2] = {nullptr, nullptr};  // of sliding layers, of full layers
    const int32_t* whole = nullptr;             // (L,) whether a layer attends to all keys
    if (s.prenorm) {
        for (int kind = 0; kind < 2; ++kind) rope[kind] = floats("rope." + std::to_string(kind), s.max_length * s.D);
        whole = reinterpret_cast<const int32_t*>(floats("whole", s.L));
        w.final_norm = norm("final_norm"), w.head_norm = norm("head_norm");
    }
    for (int l = 0; l < s.L; ++l) {
        const std::string name = std::to_string(l) + ".";
        const bool first = s.keyless_last() && l == s.L - 1;
        const Precision p = kernels.precision;
        Layer& layer = w.layers.emplace_back();
        layer.qkv = linear(name + "qkv", s.C, first ? s.C : 3 * s.C, p, s.mixed);
        if (first) layer.keys = rows(name + "keys"), layer.values = rows(name + "values");
        if (s.relative > 0) {
            const size_t bytes = static_cast<size_t>(s.relative * s.C) * kernels.exchange_bytes;
            layer.relative_keys = find(name + "relative.keys", bytes), layer.relative_queries = find(name + "relative.queries", bytes);
            layer.relative_longest = floats(name + "relative.longest", 2 * s.H);
        }
        layer.out = linear(name + "out", s.C, s.C, p);
        layer.up = linear(name + "up", s.C, s.geglu ? 2 * s.F : s.F, p, s.mixed);
        layer.down = linear(name + "down", s.F, s.C, p, false, s.least);
        if (!s.prenorm || l > 0) layer.norm1 = norm(name + "norm1");
        layer.norm2 = norm(name + "norm2");
        if (whole) layer.rope = rope[whole[l] != 0], layer.window = whole[l] ? 0 : s.window;
    }
    if (s.has_cosine()) w.similarity = floats("similarity", 3);
    if (!s.cosine) w.pooler = linear("pooler", s.C, s.C, Precision::fp32), w.head = floats("head", s.C + 1);
    return w;
}

}  // namespace turborank
