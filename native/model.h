// The engine: computes the logits of packed batches with packed weights.
#pragma once

#include <array>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace turborank {

// Packed weights by name. The caller keeps them alive as long as the model.
using Arrays = std::map<std::string, std::span<const std::byte>>;

// Throws std::invalid_argument naming an array that is missing or of a wrong size.
Weights weights_of(const Shape& shape, const Arrays& arrays, const Kernels& kernels);

// A config's numbers by name (turborank/engines/native.py, plain_config) -> Shape. number(name) returns float, which
// represents all of them exactly.
template <class Number>
Shape shape_of(const Number& number) {
    Shape s;
    const std::pair<const char*, int Shape::*> sizes[] = {
        {"vocab_size", &Shape::vocab}, {"hidden_size", &Shape::C}, {"num_hidden_layers", &Shape::L}, {"num_attention_heads", &Shape::H},
        {"intermediate_size", &Shape::F}, {"max_length", &Shape::max_length}, {"type_vocab_size", &Shape::types}, {"positions", &Shape::positions},
        {"position_offset", &Shape::position_offset}, {"repeat_from", &Shape::repeat_from}, {"passage", &Shape::passage}, {"relative", &Shape::relative}, {"window", &Shape::window}};
    const std::pair<const char*, bool Shape::*> flags[] = {
        {"geglu", &Shape::geglu}, {"cosine", &Shape::cosine}, {"sum", &Shape::sum}, {"alibi", &Shape::alibi}, {"mixed", &Shape::mixed},
        {"gelu_head", &Shape::gelu_head}, {"prenorm", &Shape::prenorm}, {"mean", &Shape::mean}};
    for (const auto& [name, size] : sizes) s.*size = static_cast<int>(number(name));
    for (const auto& [name, flag] : flags) s.*flag = number(name) != 0;
    s.D = s.C / s.H, s.stored = static_cast<Stored>(static_cast<int>(number("stored")));
    s.eps = number("layer_norm_eps"), s.least = number("least");
    return s;
}

struct Batch {
    std::span<const int32_t> ids, types;  // (T,)
    std::span<const int32_t> offsets;     // (P+1,)
    int pairs() const { return static_cast<int>(offsets.size()) - 1; }
    int length(int p) const { return offsets[p + 1] - offsets[p]; }
};

class Engine {
public:
    Engine(const Weights& weights, const Kernels* kernels);
    ~Engine();

    // Throws std::invalid_argument if the batch does not fit the model. `trace`, if given, receives the embeddings and
    // each layer's output, (rows, C); the last layer of a classifier has P rows, all others have T.
    void logits(const Batch& batch, int threads, float* out, std::vector<std::vector<float>>* trace = nullptr);

    // Seconds by Part, summed over threads and calls.
    std::array<double, kParts> spent();

    const Weights& weights() const { return weights_; }
    const Shape& shape() const { return weights_.shape; }
    const Kernels& kernels() const { return *kernels_; }

private:
    struct State;
    const Weights weights_;
    const Kernels* const kernels_;
    std::mutex calls_;
    std::unique_ptr<State> state_;
};

}  // namespace turborank
