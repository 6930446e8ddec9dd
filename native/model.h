// A model in packed form, and the engine that runs packed batches through it.
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

// A matrix or vector as the checkpoint gave it; the caller keeps it alive while it is packed (and, for word
// embeddings, while the model lives).
struct Tensor {
    Stored stored = Stored::f32;
    const void* data = nullptr;
    const float* scale = nullptr;  // (rows,), i8 only
    int64_t rows = 0, columns = 0;  // a vector is one row
};
using Tensors = std::map<std::string, Tensor>;

// Owns the packed weights.
struct Packed {
    Weights weights;
    std::vector<Buffer> memory;
};

// Throws std::invalid_argument naming the tensor that is missing or misshapen.
std::unique_ptr<Packed> pack(const Shape& shape, const std::vector<float>& slopes, const Tensors& tensors, const Kernels& kernels);

struct Batch {
    std::span<const int32_t> ids, types;  // (T,)
    std::span<const int32_t> offsets;     // (P+1,)
    int pairs() const { return static_cast<int>(offsets.size()) - 1; }
    int length(int p) const { return offsets[p + 1] - offsets[p]; }
};

class Engine {
public:
    Engine(std::unique_ptr<Packed> model, const Kernels* kernels);
    ~Engine();

    // Throws std::invalid_argument if the batch cannot be run. `trace`, if given, receives the embeddings and each
    // layer's output, one (rows, C) block after another; the last layer of a classifier has P rows, all others T.
    void logits(const Batch& batch, int threads, float* out, std::vector<std::vector<float>>* trace = nullptr);

    // Thread-seconds by Part of all calls so far.
    std::array<double, kParts> spent();

    const Shape& shape() const { return model_->weights.shape; }
    const Kernels& kernels() const { return *kernels_; }

private:
    struct State;
    std::unique_ptr<Packed> model_;
    const Kernels* kernels_;
    std::mutex calls_;
    std::unique_ptr<State> state_;
};

}  // namespace turborank
