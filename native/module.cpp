// The Python face: plain values and arrays in, bytes of float32 out; every fault of the input is a ValueError.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "model.h"

namespace nb = nanobind;
using namespace turborank;

namespace {

using Int32Array = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Matrix = nb::ndarray<nb::ro, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Scales = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr const char* kPrecisions[] = {"int8", "bf16", "fp32"};  // by Precision

Shape shape_of(const nb::dict& config) {
    Shape s;
    const std::pair<const char*, int Shape::*> sizes[] = {
        {"vocab_size", &Shape::vocab}, {"hidden_size", &Shape::C}, {"num_hidden_layers", &Shape::L}, {"num_attention_heads", &Shape::H},
        {"intermediate_size", &Shape::F}, {"max_length", &Shape::max_length}, {"type_vocab_size", &Shape::types}, {"position_offset", &Shape::position_offset},
        {"passage", &Shape::passage}};
    for (const auto& [key, size] : sizes) s.*size = nb::cast<int>(config[key]);
    s.D = s.C / s.H;
    s.eps = nb::cast<float>(config["layer_norm_eps"]);
    s.geglu = nb::cast<bool>(config["geglu"]), s.cosine = nb::cast<bool>(config["cosine"]);
    return s;
}

const Kernels* kernels_of(const IsaRow& row, const char* precision) {
    const unsigned features = detect_features();
    for (int p = 0; (row.needs & features) == row.needs && p < 3; ++p)
        if (std::strcmp(precision, kPrecisions[p]) == 0) return row.kernels(static_cast<Precision>(p), features);
    return nullptr;
}

// Instruction-set rows that this machine can run, best first, with their precisions.
nb::dict isas() {
    nb::dict rows;
    for (const IsaRow& row : isa_table()) {
        nb::list precisions;
        for (const char* name : kPrecisions)
            if (kernels_of(row, name)) precisions.append(name);
        if (nb::len(precisions)) rows[row.name] = precisions;
    }
    return rows;
}

// What Python checks before it calls (engines/native.py): sizes, dtypes, scales. What needs the packed layout to be known
// is checked here, and every batch.
class Model {
public:
    // `tensors`: (name, Stored, array, its rows' scales or None).
    Model(const nb::dict& config, const nb::list& given, const std::string& precision, const std::string& isa) {
        const Kernels* kernels = nullptr;
        for (const IsaRow& row : isa_table())
            if (isa == row.name) kernels = kernels_of(row, precision.c_str());
        if (!kernels) throw std::invalid_argument("expected an instruction set and a precision of this machine, got " + isa + " and " + precision);
        Tensors tensors;
        for (const nb::handle entry : given) {
            const auto [name, stored, array, scale] = nb::cast<std::tuple<std::string, int, Matrix, std::optional<Scales>>>(entry);
            tensors[name] = {static_cast<Stored>(stored), array.data(), scale ? scale->data() : nullptr, static_cast<int64_t>(array.shape(0)),
                             static_cast<int64_t>(array.shape(1))};
            if (name == "embeddings.word_embeddings.weight") words_ = nb::borrow(entry);
        }
        const Shape shape = shape_of(config);
        const auto slopes = nb::cast<std::vector<float>>(config["slopes"]);
        nb::gil_scoped_release release;
        engine_ = std::make_unique<Engine>(pack(shape, slopes, tensors, *kernels), kernels);
    }

    nb::bytes logits(const Int32Array& ids, const Int32Array& types, const Int32Array& offsets, int threads) {
        return run(ids, types, offsets, threads, nullptr);
    }

    // The embeddings and each layer's output, (rows, C) each.
    nb::list layers(const Int32Array& ids, const Int32Array& types, const Int32Array& offsets, int threads) {
        std::vector<std::vector<float>> trace;
        run(ids, types, offsets, threads, &trace);
        nb::list result;
        for (const auto& layer : trace) result.append(bytes(layer));
        return result;
    }

    nb::dict spent() {
        const std::array<double, kParts> seconds = engine_->spent();
        nb::dict result;
        for (size_t part = 0; part < kParts; ++part) result[kPartNames[part]] = seconds[part];
        return result;
    }

    const char* kernel() const { return engine_->kernels().gemm; }
    const char* attention() const { return engine_->kernels().exchange_bytes == 2 ? "bf16" : "fp32"; }

private:
    static nb::bytes bytes(const std::vector<float>& values) { return nb::bytes(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float)); }

    nb::bytes run(const Int32Array& ids, const Int32Array& types, const Int32Array& offsets, int threads, std::vector<std::vector<float>>* trace) {
        const Batch batch{{ids.data(), ids.size()}, {types.data(), types.size()}, {offsets.data(), offsets.size()}};
        std::vector<float> out(offsets.size() ? offsets.size() - 1 : 0);
        {
            nb::gil_scoped_release release;
            engine_->logits(batch, threads, out.data(), trace);
        }
        return bytes(out);
    }

    nb::object words_;  // the word embeddings are read where they lie
    std::unique_ptr<Engine> engine_;
};

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "turborank's C++ engine; see turborank.engines.native and docs/kernels.md.";
    nb::class_<Model>(m, "Model")
        .def(nb::init<const nb::dict&, const nb::list&, const std::string&, const std::string&>(), nb::arg("config"), nb::arg("tensors"),
             nb::arg("precision"), nb::arg("isa"))
        .def("logits", &Model::logits, nb::arg("input_ids"), nb::arg("type_ids"), nb::arg("cu_seqlens"), nb::arg("threads"))
        .def("layers", &Model::layers, nb::arg("input_ids"), nb::arg("type_ids"), nb::arg("cu_seqlens"), nb::arg("threads"))
        .def("spent", &Model::spent, "Thread-seconds of all calls so far by part of the work.")
        .def_prop_ro("kernel", &Model::kernel, "The matrix product's instruction.")
        .def_prop_ro("attention", &Model::attention, "The element type of attention.");
    m.def("isas", &isas, "Instruction-set rows this machine can run, best first, with their precisions.");
}
