// Runs recorded cases (tests/native/cases.py: random models and batches with the numpy reference's logits) through every
// instruction set and precision of the machine, at several thread counts. Built with sanitizers by sanitize.sh, and
// for other processors under emulation. Prints one line a run; the exit code counts the failures. With --layouts it prints
// what cases.py must know of the rows that run here; with --run ROW PRECISION TIMES CASE it computes a case so many times with
// one thread, for counters of instructions.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <thread>

#include "../../native/model.h"

using namespace turborank;

namespace {

struct Free {
    void operator()(std::byte* p) const {
#if defined(_WIN32)
        _aligned_free(p);
#else
        std::free(p);
#endif
    }
};

std::byte* allocate(size_t bytes) {
#if defined(_WIN32)
    return static_cast<std::byte*>(_aligned_malloc(bytes, 64));
#else
    return static_cast<std::byte*>(std::aligned_alloc(64, bytes));
#endif
}

// On whole cache lines, and no further, so that the address sanitizer sees who reads beyond it.
struct Bytes {
    std::unique_ptr<std::byte, Free> data;
    size_t size = 0;
};

// What a row of the instruction-set table reads in one precision.
struct Model {
    Shape shape;
    std::map<std::string, Bytes> packed;
};

struct Case {
    std::map<std::pair<std::string, std::string>, Model> models;
    std::vector<int32_t> ids, types, offsets;
    std::vector<float> expected;
    std::map<std::string, float> tolerance;  // by precision
};

template <class T>
std::vector<T> read(std::istream& in, size_t n) {
    std::vector<T> out(n);
    in.read(reinterpret_cast<char*>(out.data()), static_cast<std::streamsize>(n * sizeof(T)));
    if (!in) throw std::runtime_error("the case file ends too early");
    return out;
}

// Lines of words; a line that names an array is followed by its bytes.
Case load(const char* path) {
    std::ifstream in(path, std::ios::binary);
    if (!in) throw std::runtime_error(std::string("cannot read ") + path);
    Case c;
    Model* model = nullptr;
    for (std::string line; std::getline(in, line);) {
        std::istringstream words(line);
        std::string kind, name;
        size_t size = 0;
        words >> kind >> name;
        if (kind == "model") {
            std::string precision, key;
            std::map<std::string, float> config;
            for (words >> precision; words >> key;) words >> config[key];
            model = &c.models[{name, precision}];
            model->shape = shape_of([&](const char* wanted) { return config.at(wanted); });
        } else if (kind == "array" && model) {
            words >> size;
            const auto bytes = read<std::byte>(in, size);
            std::byte* const copy = allocate((size + 63) / 64 * 64);
            std::memcpy(copy, bytes.data(), size);
            model->packed[name] = {std::unique_ptr<std::byte, Free>(copy), size};
        } else if (kind == "batch") {
            words >> size;
            c.ids = read<int32_t>(in, std::stoul(name));
            c.types = read<int32_t>(in, c.ids.size());
            c.offsets = read<int32_t>(in, size + 1);
            c.expected = read<float>(in, size);
        } else if (kind == "tolerance") {
            words >> c.tolerance[name];
        }
    }
    return c;
}

int failures = 0;

void report(const char* path, const char* isa, const std::string& precision, const char* what, float worst, bool well) {
    std::printf("%s %-10s %-4s %-24s %.3g  %s\n", well ? "ok  " : "FAIL", isa, precision.c_str(), what, static_cast<double>(worst), path);
    failures += !well;
}

Arrays arrays_of(const Model& model) {
    Arrays arrays;
    for (const auto& [name, bytes] : model.packed) arrays[name] = {bytes.data.get(), bytes.size};
    return arrays;
}

void run(const char* path, const Case& c, const IsaRow& row, Precision kind, const std::string& precision) {
    const Kernels* kernels = row.kernels(kind, detect_features());
    const auto found = c.models.find({row.name, precision});
    if (!kernels || found == c.models.end()) return;  // not every row computes every model: native.row_of()
    const Model& model = found->second;
    Engine engine(weights_of(model.shape, arrays_of(model), *kernels), kernels);
    const Batch batch{c.ids, c.types, c.offsets};
    const size_t pairs = c.expected.size();
    std::vector<float> first(pairs), out(pairs);
    engine.logits(batch, 1, first.data());
    float worst = 0.0f;
    for (size_t p = 0; p < pairs; ++p) worst = std::fmax(worst, std::fabs(first[p] - c.expected[p]));
    report(path, row.name, precision, "against the reference", worst, worst <= c.tolerance.at(precision));

    bool same = true;
    for (const int threads : {2, 3, 5}) {
        engine.logits(batch, threads, out.data());
        same = same && std::memcmp(out.data(), first.data(), pairs * sizeof(float)) == 0;
    }
    for (size_t p = 0; p < pairs; ++p) {
        const int32_t from = c.offsets[p], n = c.offsets[p + 1] - from, offsets[] = {0, n};
        float alone;
        engine.logits({{c.ids.data() + from, static_cast<size_t>(n)}, {c.types.data() + from, static_cast<size_t>(n)}, offsets}, 2, &alone);
        same = same && std::memcmp(&alone, &first[p], sizeof alone) == 0;
    }
    report(path, row.name, precision, "same bits", 0.0f, same);

    std::vector<std::vector<float>> results(3, std::vector<float>(pairs));
    std::vector<std::thread> callers;
    for (auto& result : results) callers.emplace_back([&] { engine.logits(batch, 2, result.data()); });
    for (auto& t : callers) t.join();
    same = true;
    for (const auto& result : results) same = same && result == first;
    report(path, row.name, precision, "three callers at once", 0.0f, same);
}

// Of each row and precision: native_weights.Packing.
int layouts() {
    const unsigned features = detect_features();
    for (const IsaRow& row : isa_table())
        for (const auto& [precision, name] : {std::pair{Precision::int8, "int8"}, {Precision::bf16, "bf16"}, {Precision::fp32, "fp32"}}) {
            const Kernels* k = (row.needs & features) == row.needs ? row.kernels(precision, features) : nullptr;
            if (k) std::printf("%s %s %d %d %d %d %zu %s\n", row.name, name, k->int8_group, k->tiles, k->int8_offset, k->lanes, k->exchange_bytes, k->gemm);
        }
    return 0;
}

int run_times(const std::string& isa, const std::string& precision, int times, const Case& c) {
    const Precision kind = precision == "int8" ? Precision::int8 : precision == "bf16" ? Precision::bf16 : Precision::fp32;
    for (const IsaRow& row : isa_table()) {
        const Kernels* kernels = row.name == isa && missing(row).empty() ? row.kernels(kind, detect_features()) : nullptr;
        if (!kernels) continue;
        const Model& model = c.models.at({isa, precision});
        Engine engine(weights_of(model.shape, arrays_of(model), *kernels), kernels);
        std::vector<float> out(c.expected.size());
        for (int i = 0; i < times; ++i) engine.logits({c.ids, c.types, c.offsets}, 1, out.data());
        return 0;
    }
    std::printf("%s with %s does not run here\n", isa.c_str(), precision.c_str());
    return 1;
}

}  // namespace

int main(int count, char** paths) {
    if (count == 2 && std::strcmp(paths[1], "--layouts") == 0) return layouts();
    if (count == 6 && std::strcmp(paths[1], "--run") == 0) return run_times(paths[2], paths[3], std::atoi(paths[4]), load(paths[5]));
    for (int i = 1; i < count; ++i) {
        const Case c = load(paths[i]);
        for (const IsaRow& row : isa_table()) {
            if ((row.needs & detect_features()) != row.needs) continue;
            run(paths[i], c, row, Precision::fp32, "fp32");
            run(paths[i], c, row, Precision::bf16, "bf16");
            run(paths[i], c, row, Precision::int8, "int8");
        }
    }
    std::printf("%d failures\n", failures);
    return failures != 0;
}
