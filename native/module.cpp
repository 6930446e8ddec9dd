// The Python face: plain values and arrays in, arrays out; every fault of the input is a ValueError.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdlib>
#include <optional>
#include <stdexcept>

#include "model.h"

namespace nb = nanobind;
using namespace turborank;

namespace {

using Int32Array = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using AnyArray = nb::ndarray<nb::ro, nb::c_contig, nb::device::cpu>;

template <class T>
T entry(const nb::dict& config, const char* key) {
    if (!config.contains(key)) throw std::invalid_argument(std::string("expected a value, got none at ") + key + " in the model's config");
    T value;
    if (!nb::try_cast<T>(config[key], value)) throw std::invalid_argument(std::string("expected a plain value of the right type at ") + key + " in the model's config");
    return value;
}

Shape shape_of(const nb::dict& config, const Tensors& tensors) {
    Shape s;
    s.vocab = entry<int>(config, "vocab_size");
    s.C = entry<int>(config, "hidden_size");
    s.L = entry<int>(config, "num_hidden_layers");
    s.H = entry<int>(config, "num_attention_heads");
    s.F = entry<int>(config, "intermediate_size");
    s.D = s.H > 0 ? s.C / s.H : 0;
    s.max_length = entry<int>(config, "max_length");
    s.types = entry<int>(config, "type_vocab_size");
    s.position_offset = entry<int>(config, "position_offset");
    s.eps = entry<float>(config, "layer_norm_eps");
    const auto feed_forward = entry<std::string>(config, "feed_forward"), head = entry<std::string>(config, "head");
    if (feed_forward != "geglu" && feed_forward != "gelu") throw std::invalid_argument("expected feed_forward to be one of geglu, gelu, got '" + feed_forward + "'");
    if (head != "classifier" && head != "cosine" && head != "focus") throw std::invalid_argument("expected head to be one of classifier, cosine, focus, got '" + head + "'");
    s.geglu = feed_forward == "geglu";
    s.cosine = head != "classifier";
    s.passage = head == "focus" ? entry<int>(config, "passage") : 0;
    const auto positions = tensors.find("embeddings.position_embeddings.weight");
    if (positions != tensors.end()) s.positions = static_cast<int>(positions->second.rows);
    return s;
}

Tensor tensor_of(const std::string& name, nb::handle value, std::vector<nb::object>& alive) {
    AnyArray array;
    if (!nb::try_cast<AnyArray>(value, array)) throw std::invalid_argument("expected a C-contiguous array at " + name);
    if (array.ndim() < 1 || array.ndim() > 2) throw std::invalid_argument("expected 1 or 2 dimensions, got " + std::to_string(array.ndim()) + " at " + name);
    Tensor t;
    if (array.dtype() == nb::dtype<float>()) t.stored = Stored::f32;
    else if (array.dtype() == nb::dtype<int8_t>()) t.stored = Stored::i8;
    else if (array.dtype() == nb::dtype<uint16_t>()) t.stored = Stored::bf16;
    else if (array.dtype().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float) && array.dtype().bits == 16) t.stored = Stored::f16;
    else throw std::invalid_argument("expected float32, float16, int8, or bfloat16 as uint16, got another dtype at " + name);
    t.data = array.data();
    t.rows = array.ndim() == 2 ? static_cast<int64_t>(array.shape(0)) : 1;
    t.columns = static_cast<int64_t>(array.shape(array.ndim() - 1));
    alive.push_back(nb::cast(array));
    return t;
}

// The tensors by name, "<name>_scale" joined to the int8 tensor it belongs to.
Tensors tensors_of(const nb::dict& given, std::vector<nb::object>& alive) {
    Tensors tensors;
    for (const auto& [key, value] : given) {
        const auto name = nb::cast<std::string>(key);
        tensors[name] = tensor_of(name, value, alive);
    }
    for (auto& [name, tensor] : tensors) {
        if (tensor.stored != Stored::i8) continue;
        const auto scale = tensors.find(name + "_scale");
        if (scale == tensors.end() || scale->second.stored != Stored::f32 || scale->second.rows * scale->second.columns != tensor.rows)
            throw std::invalid_argument("expected " + std::to_string(tensor.rows) + " float32 row scales at " + name + "_scale");
        tensor.scale = static_cast<const float*>(scale->second.data);
    }
    return tensors;
}

Precision precision_of(const std::string& name) {
    if (name == "int8") return Precision::int8;
    if (name == "bf16") return Precision::bf16;
    if (name == "fp32") return Precision::fp32;
    throw std::invalid_argument("expected precision to be one of int8, bf16, fp32, got '" + name + "'");
}

// The best supported row that has the precision, or the one asked for by argument.
const IsaRow& choose(const std::optional<std::string>& isa, Precision precision, const std::string& precision_name) {
    const unsigned features = detect_features();
    std::string supported;
    for (const IsaRow& row : isa_table()) {
        if ((row.needs & features) != row.needs) continue;
        const bool able = row.kernels(precision, features) != nullptr;
        if (able && (!isa || *isa == row.name)) return row;
        if (isa && *isa == row.name) throw std::invalid_argument("expected a precision that " + *isa + " has on this machine, got " + precision_name);
        supported += (supported.empty() ? "" : ", ") + std::string(row.name);
    }
    if (!isa) throw std::invalid_argument("expected a precision that this machine has, got " + precision_name);
    throw std::invalid_argument("expected an instruction set of this machine (" + supported + "), got '" + *isa + "'");
}

class Model {
public:
    Model(const nb::dict& config, const nb::dict& tensors, const std::string& precision, std::optional<std::string> isa) : precision_(precision) {
        const Precision kind = precision_of(precision);
        std::vector<nb::object> alive;
        const Tensors found = tensors_of(tensors, alive);
        const Shape shape = shape_of(config, found);
        const auto slopes = entry<std::vector<float>>(config, "slopes");
        const IsaRow& row = choose(isa, kind, precision);
        isa_ = row.name;
        {
            nb::gil_scoped_release release;
            const Kernels* kernels = row.kernels(kind, detect_features());
            engine_ = std::make_unique<Engine>(pack(shape, slopes, found, kind, *kernels), kernels);
        }
        for (const char* name : {"embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight_scale"})
            if (tensors.contains(name)) alive_.push_back(nb::borrow(tensors[name]));
    }

    nb::object logits(const Int32Array& ids, const Int32Array& types, const Int32Array& offsets, int threads) {
        const Batch batch = batch_of(ids, types, offsets);
        const size_t pairs = offsets.size() ? offsets.size() - 1 : 0;
        auto out = std::make_unique<float[]>(pairs + 1);
        {
            nb::gil_scoped_release release;
            engine_->logits(batch, threads, out.get());
        }
        return array(std::move(out), {pairs});
    }

    // The embeddings and each layer's output, (rows, C) each.
    nb::list layers(const Int32Array& ids, const Int32Array& types, const Int32Array& offsets, int threads) {
        const Batch batch = batch_of(ids, types, offsets);
        std::vector<float> out(offsets.size() + 1);
        std::vector<std::vector<float>> trace;
        {
            nb::gil_scoped_release release;
            engine_->logits(batch, threads, out.data(), &trace);
        }
        const size_t C = static_cast<size_t>(engine_->shape().C);
        nb::list result;
        for (const auto& layer : trace) {
            auto copy = std::make_unique<float[]>(layer.size());
            std::copy(layer.begin(), layer.end(), copy.get());
            result.append(array(std::move(copy), {layer.size() / C, C}));
        }
        return result;
    }

    nb::dict spent() {
        const std::array<double, kParts> seconds = engine_->spent();
        nb::dict result;
        for (size_t part = 0; part < kParts; ++part) result[kPartNames[part]] = seconds[part];
        return result;
    }

    const std::string& isa() const { return isa_; }
    const std::string& precision() const { return precision_; }
    std::string kernel() const { return engine_->kernels().gemm; }
    std::string attention() const { return engine_->kernels().exchange_bytes == 2 ? "bf16" : "fp32"; }

private:
    static Batch batch_of(const Int32Array& ids, const Int32Array& types, const Int32Array& offsets) {
        return {{ids.data(), ids.size()}, {types.data(), types.size()}, {offsets.data(), offsets.size()}};
    }
    static nb::object array(std::unique_ptr<float[]> data, const std::vector<size_t>& shape) {
        float* raw = data.get();
        nb::capsule owner(data.release(), [](void* p) noexcept { delete[] static_cast<float*>(p); });
        return nb::cast(nb::ndarray<nb::numpy, float>(raw, shape.size(), shape.data(), owner));
    }

    std::string isa_, precision_;
    std::vector<nb::object> alive_;  // the word embeddings are read where they lie
    std::unique_ptr<Engine> engine_;
};

nb::list supported() {
    nb::list names;
    for (const IsaRow& row : isa_table())
        if ((row.needs & detect_features()) == row.needs) names.append(row.name);
    return names;
}

nb::list precisions(const std::string& isa) {
    nb::list names;
    for (const IsaRow& row : isa_table())
        if (isa == row.name && (row.needs & detect_features()) == row.needs)
            for (const char* name : {"int8", "bf16", "fp32"})
                if (row.kernels(precision_of(name), detect_features())) names.append(name);
    return names;
}

}  // namespace

NB_MODULE(_native, m) {
    m.doc() = "turborank's C++ engine; see turborank.engines.native and docs/kernels.md.";
    nb::class_<Model>(m, "Model")
        .def(nb::init<const nb::dict&, const nb::dict&, const std::string&, std::optional<std::string>>(), nb::arg("config"), nb::arg("tensors"),
             nb::arg("precision"), nb::arg("isa") = nb::none())
        .def("logits", &Model::logits, nb::arg("input_ids"), nb::arg("type_ids"), nb::arg("cu_seqlens"), nb::arg("threads"))
        .def("layers", &Model::layers, nb::arg("input_ids"), nb::arg("type_ids"), nb::arg("cu_seqlens"), nb::arg("threads"))
        .def("spent", &Model::spent, "Thread-seconds of all calls so far by part of the work.")
        .def_prop_ro("isa", &Model::isa)
        .def_prop_ro("precision", &Model::precision)
        .def_prop_ro("kernel", &Model::kernel, "The matrix product's instruction.")
        .def_prop_ro("attention", &Model::attention, "The element type of attention.");
    m.def("isas", &supported, "Instruction-set rows this machine can run, best first.");
    m.def("precisions", &precisions, nb::arg("isa"), "Precisions of a row on this machine.");
    m.def("features", [] { return feature_names(detect_features()); }, "Processor features found, as words.");
}
