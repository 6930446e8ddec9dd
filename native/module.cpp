// The Python face: plain values and arrays in, bytes of float32 out; every fault of the input is a ValueError.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "model.h"

namespace nb = nanobind;
using namespace turborank;

namespace {

using Int32Array = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using AnyArray = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

constexpr const char* kPrecisions[] = {"int8", "bf16", "fp32"};  // by Precision

void expect(bool well, const std::string& what) {
    if (!well) throw std::invalid_argument("expected " + what);
}

template <class T>
T entry(const nb::dict& config, const char* key) {
    T value{};
    expect(config.contains(key) && nb::try_cast<T>(config[key], value), std::string("a plain value of the right type at ") + key + " in the model's config");
    return value;
}

Shape shape_of(const nb::dict& config) {
    Shape s;
    const std::pair<const char*, int Shape::*> sizes[] = {
        {"vocab_size", &Shape::vocab}, {"hidden_size", &Shape::C}, {"num_hidden_layers", &Shape::L}, {"num_attention_heads", &Shape::H},
        {"intermediate_size", &Shape::F}, {"max_length", &Shape::max_length}, {"type_vocab_size", &Shape::types}, {"position_offset", &Shape::position_offset},
        {"passage", &Shape::passage}};
    for (const auto& [key, size] : sizes) s.*size = entry<int>(config, key);
    s.D = s.H > 0 ? s.C / s.H : 0;
    s.eps = entry<float>(config, "layer_norm_eps");
    s.geglu = entry<bool>(config, "geglu");
    s.cosine = entry<bool>(config, "cosine");
    return s;
}

Tensor tensor_of(const std::string& name, nb::handle value) {
    AnyArray array;
    expect(nb::try_cast<AnyArray>(value, array, false), "a C-contiguous array at " + name);
    expect(array.ndim() == 1 || array.ndim() == 2, "1 or 2 dimensions, got " + std::to_string(array.ndim()) + " at " + name);
    Tensor t;
    const nb::dlpack::dtype dtype = array.dtype();
    if (dtype == nb::dtype<float>()) t.stored = Stored::f32;
    else if (dtype == nb::dtype<int8_t>()) t.stored = Stored::i8;
    else if (dtype == nb::dtype<uint16_t>()) t.stored = Stored::bf16;
    else if (dtype.code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) && dtype.bits == 16) t.stored = Stored::f16;
    else expect(false, "float32, float16, int8, or bfloat16 as uint16, got another dtype at " + name);
    t.data = array.data();
    t.rows = array.ndim() == 2 ? static_cast<int64_t>(array.shape(0)) : 1;
    t.columns = static_cast<int64_t>(array.shape(array.ndim() - 1));
    return t;
}

// The tensors by name, "<name>_scale" joined to the int8 tensor it belongs to.
Tensors tensors_of(const nb::dict& given) {
    Tensors tensors;
    for (const auto& [key, value] : given) {
        const auto name = nb::cast<std::string>(key);
        tensors[name] = tensor_of(name, value);
    }
    for (auto& [name, tensor] : tensors) {
        if (tensor.stored != Stored::i8) continue;
        const auto scale = tensors.find(name + "_scale");
        expect(scale != tensors.end() && scale->second.stored == Stored::f32 && scale->second.rows * scale->second.columns == tensor.rows,
               std::to_string(tensor.rows) + " float32 row scales at " + name + "_scale");
        tensor.scale = static_cast<const float*>(scale->second.data);
    }
    return tensors;
}

const Kernels* kernels_of(const std::string& isa, const std::string& precision) {
    for (const IsaRow& row : isa_table())
        for (int p = 0; isa == row.name && (row.needs & detect_features()) == row.needs && p < 3; ++p)
            if (precision == kPrecisions[p]) return row.kernels(static_cast<Precision>(p), detect_features());
    return nullptr;
}

nb::list precisions(const std::string& isa) {
    nb::list names;
    for (const char* name : kPrecisions)
        if (kernels_of(isa, name)) names.append(name);
    return names;
}

nb::list isas() {
    nb::list names;
    for (const IsaRow& row : isa_table())
        if (kernels_of(row.name, "int8")) names.append(row.name);
    return names;
}

class Model {
public:
    Model(const nb::dict& config, const nb::dict& given, const std::string& precision, const std::string& isa) {
        const Kernels* kernels = kernels_of(isa, precision);
        expect(kernels, "an instruction set and a precision of this machine, got " + isa + " and " + precision);
        const Tensors tensors = tensors_of(given);
        const Shape shape = shape_of(config);
        const auto slopes = entry<std::vector<float>>(config, "slopes");
        {
            nb::gil_scoped_release release;
            engine_ = std::make_unique<Engine>(pack(shape, slopes, tensors, *kernels), kernels);
        }
        for (const char* name : {"embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight_scale"})
            if (given.contains(name)) alive_.push_back(nb::borrow(given[name]));
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

    std::vector<nb::object> alive_;  // the word embeddings are read where they lie
    std::unique_ptr<Engine> engine_;
};

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "turborank's C++ engine; see turborank.engines.native and docs/kernels.md.";
    nb::class_<Model>(m, "Model")
        .def(nb::init<const nb::dict&, const nb::dict&, const std::string&, const std::string&>(), nb::arg("config"), nb::arg("tensors"),
             nb::arg("precision"), nb::arg("isa"))
        .def("logits", &Model::logits, nb::arg("input_ids"), nb::arg("type_ids"), nb::arg("cu_seqlens"), nb::arg("threads"))
        .def("layers", &Model::layers, nb::arg("input_ids"), nb::arg("type_ids"), nb::arg("cu_seqlens"), nb::arg("threads"))
        .def("spent", &Model::spent, "Thread-seconds of all calls so far by part of the work.")
        .def_prop_ro("kernel", &Model::kernel, "The matrix product's instruction.")
        .def_prop_ro("attention", &Model::attention, "The element type of attention.");
    m.def("isas", &isas, "Instruction-set rows this machine can run, best first.");
    m.def("precisions", &precisions, nb::arg("isa"), "Precisions of a row on this machine.");
}
