// The Python interface: takes plain values and arrays, returns bytes of float32; invalid input raises ValueError.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <stdexcept>

#include "model.h"

namespace nb = nanobind;
using namespace turborank;

namespace {

using Int32Array = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ByteArray = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr const char* kPrecisions[] = {"int8", "bf16", "fp32"};  // by Precision

const Kernels* kernels_of(const IsaRow& row, const char* precision) {
    const unsigned features = detect_features();
    for (int p = 0; (row.needs & features) == row.needs && p < 3; ++p)
        if (std::strcmp(precision, kPrecisions[p]) == 0) return row.kernels(static_cast<Precision>(p), features);
    return nullptr;
}

// Instruction-set rows that this machine can run, best first, with their precisions and the weight layout of each.
nb::dict isas() {
    nb::dict rows;
    for (const IsaRow& row : isa_table()) {
        nb::dict precisions;
        for (const char* name : kPrecisions)
            if (const Kernels* k = kernels_of(row, name))
                precisions[name] = nb::make_tuple(k->int8_group, k->tiles, k->int8_offset, k->lanes, k->exchange_bytes);
        if (nb::len(precisions)) rows[row.name] = precisions;
    }
    return rows;
}

// All rows of this build, best first, each with the features that this machine lacks for it.
nb::dict rows() {
    nb::dict rows;
    for (const IsaRow& row : isa_table()) rows[row.name] = missing(row);
    return rows;
}

// Python checks the sizes of the config before it calls (engines/native.py). Array sizes and batches are checked here.
class Model {
public:
    // `packed`: arrays of bytes by the names of weights.cpp; referenced, not copied.
    Model(const nb::dict& config, const nb::dict& packed, const std::string& precision, const std::string& isa) : packed_(packed) {
        const Kernels* kernels = nullptr;
        for (const IsaRow& row : isa_table())
            if (isa == row.name) kernels = kernels_of(row, precision.c_str());
        if (!kernels) throw std::invalid_argument("expected an instruction set and a precision of this machine, got " + isa + " and " + precision);
        Arrays arrays;
        for (const auto& [name, value] : packed) {
            const auto array = nb::cast<ByteArray>(value);
            arrays[nb::cast<std::string>(name)] = {reinterpret_cast<const std::byte*>(array.data()), array.size()};
        }
        engine_ = std::make_unique<Engine>(weights_of(shape_of([&](const char* name) { return nb::cast<float>(config[name]); }), arrays, *kernels), kernels);
    }

    // After a fork, in the child: the old engine's threads are the parent's and its lock may be held by one of them. It can
    // be neither used nor destroyed, so it is left where it is; its pages are the parent's until they are written.
    void renew() {
        auto anew = std::make_unique<Engine>(engine_->weights(), &engine_->kernels());
        engine_.release();
        engine_ = std::move(anew);
    }

    nb::bytes logits(const Int32Array& ids, const Int32Array& types, const Int32Array& offsets, int threads) {
        return run(ids, types, offsets, threads, nullptr);
    }

    // The embeddings and each layer's output, (rows, C).
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

    nb::dict packed_;
    std::unique_ptr<Engine> engine_;
};

}  // namespace

NB_MODULE(_native, m) {
    // A process may end while engines are in use (an exception, sys.exit with a pool of threads). The system takes all back;
    // nanobind's report of what still lived would tell a user nothing.
    nb::set_leak_warnings(false);
    m.doc() = "turborank's C++ engine; see turborank.engines.native and docs/kernels.md.";
    m.attr("build") = TR_BUILD;  // the compiler and its level of optimisation, from CMakeLists.txt
    nb::class_<Model>(m, "Model")
        .def(nb::init<const nb::dict&, const nb::dict&, const std::string&, const std::string&>(), nb::arg("config"), nb::arg("packed"),
             nb::arg("precision"), nb::arg("isa"))
        .def("logits", &Model::logits, nb::arg("input_ids"), nb::arg("type_ids"), nb::arg("cu_seqlens"), nb::arg("threads"))
        .def("layers", &Model::layers, nb::arg("input_ids"), nb::arg("type_ids"), nb::arg("cu_seqlens"), nb::arg("threads"))
        .def("renew", &Model::renew, "In a forked child: start anew without the parent's threads and locks.")
        .def("spent", &Model::spent, "Thread-seconds of all calls so far by part of the work.")
        .def_prop_ro("kernel", &Model::kernel, "The matrix product's instruction.")
        .def_prop_ro("attention", &Model::attention, "The element type of attention.");
    m.def("isas", &isas, "Instruction-set rows this machine can run, best first, with their precisions.");
    m.def("rows", &rows, "All instruction-set rows of this build, best first, with what this machine lacks for each.");
}
