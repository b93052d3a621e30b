// The operators as PyTorch's dispatcher calls them. Registered unboxed, from torch/library.h: with the eight arguments of
// group_gemm a call through the stable ABI, which boxes every tensor twice, takes 1.7 us more and compiling 4 s less.
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <type_traits>

#include "linear.h"
#include "moe.h"

namespace {

using at::ScalarType;
using at::Tensor;
using MaybeTensor = std::optional<Tensor>;
namespace lc = llmcompress;

std::optional<lc::Type> type_of(const Tensor& x) {
    switch (x.scalar_type()) {
        case ScalarType::Float: return lc::FP32;
        case ScalarType::BFloat16: return lc::BF16;
        case ScalarType::Half: return lc::FP16;
        default: return std::nullopt;
    }
}

// Tests fill outputs with NaN first, so that an element that is never written shows.
bool fill_with_nan = false;

// A contiguous tensor of the type of `like`. Through the dispatcher this would cost as much as a small product.
Tensor empty_like(const Tensor& like, at::IntArrayRef shape) {
    Tensor out = at::detail::empty_cpu(shape, like.scalar_type(), false, std::nullopt);
    if (fill_with_nan && out.numel() > 0) std::memset(out.data_ptr(), 0xff, out.nbytes());
    return out;
}

Tensor in_order(const Tensor& x) { return x.is_contiguous() ? x : x.contiguous(); }

int planes_of(lc::Type type, bool int8) { return int8 ? 1 : type == lc::FP32 ? 3 : 2; }

template <typename T>
const T* data(const Tensor& x) {
    return static_cast<const T*>(x.const_data_ptr());
}

bool plain(const Tensor& x, ScalarType type) { return x.is_contiguous() && x.scalar_type() == type && x.is_cpu(); }
bool plain(const MaybeTensor& x, ScalarType type) { return !x || plain(*x, type); }

// The definition of an operator with this function's signature, for what the kernels decline.
template <typename... Args>
Tensor definition(const char* name, Tensor (*)(Args...), std::type_identity_t<Args>... args) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Tensor(Args...)>().call(args...);
}

// Whether `x` holds `width` values for each of `rows` rows, row by row or 16 rows interleaved.
bool holds(const Tensor& x, int64_t rows, int64_t width, bool interleaved) {
    const auto sizes = x.sizes();
    return interleaved ? sizes.equals({rows / lc::LANES, width, int64_t(lc::LANES)}) : sizes.equals({rows, width});
}

Tensor group_gemm(const Tensor& x, const Tensor& packed, const Tensor& scale, const MaybeTensor& zero, int64_t bits,
                  int64_t group, int64_t columns, bool int8) {
    const auto type = type_of(x);
    const bool interleaved = packed.dim() == 3;
    const int64_t rows = packed.dim() == 0 ? 0 : interleaved ? packed.size(0) * lc::LANES : packed.size(0);
    // what does not fit is left to the definition, which says why
    const auto fits = [&](const Tensor& part, int64_t numbers) { return holds(part, rows, numbers, interleaved); };
    const auto words = [bits](int64_t codes) { return (codes * bits + 31) / 32; };
    const int64_t groups = group < 1 ? 0 : (columns + group - 1) / group;
    const bool runs = type && plain(packed, ScalarType::Int) && plain(scale, ScalarType::Half) &&
                      plain(zero, ScalarType::Int) && groups > 0 && !lc::declined(int(bits), group, columns) &&
                      x.dim() > 0 && x.size(-1) == columns && fits(packed, words(columns)) && fits(scale, groups) &&
                      (!zero || fits(*zero, words(groups)));
    if (!runs)
        return definition("llmcompress::group_gemm_definition", &group_gemm, x, packed, scale, zero, bits, group, columns, int8);
    const Tensor input = in_order(x);
    at::DimVector shape(x.sizes());
    shape.back() = rows;
    Tensor out = empty_like(x, shape);
    const int64_t tokens = x.numel() / columns;
    if (tokens > 0 && rows > 0) {
        const lc::Operand w{data<uint32_t>(packed), data<uint16_t>(scale), zero ? data<uint32_t>(*zero) : nullptr,
                            rows, columns, group, int(bits), interleaved};
        lc::linear(w, input.const_data_ptr(), *type, tokens, planes_of(*type, int8), out.mutable_data_ptr());
    }
    return out;
}

constexpr int64_t DENSE_BITS = 16;

// Whether `x` holds `width` values for each of `rows` rows of every expert, row by row or 16 rows interleaved.
bool holds(const Tensor& x, int64_t experts, int64_t rows, int64_t width, bool interleaved) {
    const auto sizes = x.sizes();
    if (!interleaved) return sizes.equals({experts, rows, width});
    return rows % lc::LANES == 0 && sizes.equals({experts, rows / lc::LANES, width, int64_t(lc::LANES)});
}

// One side of the experts, or nothing where the kernels decline: what does not fit is left to the definition, which says why.
std::optional<lc::Side> side(const Tensor& weight, const MaybeTensor& scale, const MaybeTensor& zero, const MaybeTensor& bias,
                             int64_t bits, int64_t group, int64_t experts, int64_t rows, int64_t columns) {
    lc::Side s{};
    s.packed.rows = rows;
    s.packed.columns = columns;
    if (!weight.is_contiguous() || !weight.is_cpu()) return std::nullopt;
    if (bias) {
        const auto type = type_of(*bias);
        if (!type || !bias->is_contiguous() || !bias->is_cpu() || !bias->sizes().equals({experts, rows})) return std::nullopt;
        s.bias = bias->const_data_ptr();
        s.bias_type = *type;
    }
    if (bits == DENSE_BITS) {
        const auto type = type_of(weight);
        if (!type || !weight.sizes().equals({experts, rows, columns})) return std::nullopt;
        s.dense = weight.const_data_ptr();
        s.dense_type = *type;
        // a harmless shape for what only packed weights need
        s.packed.group = columns;
        s.packed.bits = 8;
        return s;
    }
    if (!scale || !plain(weight, ScalarType::Int) || !plain(scale, ScalarType::Half) || !plain(zero, ScalarType::Int))
        return std::nullopt;
    const bool interleaved = weight.dim() == 4;
    if (lc::declined(int(bits), group, columns)) return std::nullopt;
    const int64_t groups = (columns + group - 1) / group;
    if (!holds(weight, experts, rows, (columns * bits + 31) / 32, interleaved) || !holds(*scale, experts, rows, groups, interleaved) ||
        (zero && !holds(*zero, experts, rows, (groups * bits + 31) / 32, interleaved)))
        return std::nullopt;
    s.packed = {data<uint32_t>(weight), data<uint16_t>(*scale), zero ? data<uint32_t>(*zero) : nullptr, rows, columns, group,
                int(bits), interleaved};
    return s;
}

// Whether every slot names an expert, or the index after the last one, which skips it.
bool in_range(const Tensor& index, int64_t experts) {
    const int64_t* const at = data<int64_t>(index);
    return std::all_of(at, at + index.numel(), [experts](int64_t e) { return e >= 0 && e <= experts; });
}

std::optional<lc::Activation> activation_of(c10::string_view name) {
    if (name == "silu") return lc::SILU;
    if (name == "gelu") return lc::GELU;
    if (name == "gelu_pytorch_tanh") return lc::GELU_TANH;
    if (name == "gpt_oss") return lc::GPT_OSS;
    if (name == "relu2") return lc::RELU2;
    return std::nullopt;
}

Tensor moe_group_gemm(const Tensor& x, const Tensor& index, const Tensor& weights, const Tensor& gate_up,
                      const MaybeTensor& gate_up_scale, const MaybeTensor& gate_up_zero, const MaybeTensor& gate_up_bias,
                      int64_t gate_up_bits, int64_t gate_up_group, const Tensor& down, const MaybeTensor& down_scale,
                      const MaybeTensor& down_zero, const MaybeTensor& down_bias, int64_t down_bits, int64_t down_group,
                      int64_t intermediate, c10::string_view activation, double alpha, double limit, bool int8) {
    const auto type = type_of(x), weight_type = type_of(weights);
    const auto kind = activation_of(activation);
    if (type && weight_type && kind && x.dim() == 2 && index.dim() == 2 && gate_up.dim() > 0 && x.is_cpu() && index.is_cpu() &&
        weights.is_cpu() && index.scalar_type() == ScalarType::Long && index.size(0) == x.size(0) &&
        weights.sizes() == index.sizes()) {
        const int64_t hidden = x.size(1), experts = gate_up.size(0);
        const auto first = side(gate_up, gate_up_scale, gate_up_zero, gate_up_bias, gate_up_bits, gate_up_group,
                                experts, lc::first_rows(*kind, intermediate), hidden);
        const auto second = side(down, down_scale, down_zero, down_bias, down_bits, down_group, experts, hidden, intermediate);
        const Tensor chosen = in_order(index);
        if (first && second && in_range(chosen, experts)) {
            const Tensor input = in_order(x);
            const Tensor factors = in_order(weights);
            Tensor out = empty_like(input, {x.size(0), hidden});
            const lc::Routing routing{data<int64_t>(chosen), factors.const_data_ptr(), *weight_type,
                                      x.size(0), index.size(1), experts};
            lc::experts(*first, *second, routing, input.const_data_ptr(), *type, planes_of(*type, int8), *kind, float(alpha),
                        float(limit), out.mutable_data_ptr());
            return out;
        }
    }
    return definition("llmcompress::moe_group_gemm_definition", &moe_group_gemm, x, index, weights, gate_up, gate_up_scale, gate_up_zero,
                      gate_up_bias, gate_up_bits, gate_up_group, down, down_scale, down_zero, down_bias, down_bits,
                      down_group, intermediate, activation, alpha, limit, int8);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) void llmcompress_fill_with_nan(int on) { fill_with_nan = on != 0; }

TORCH_LIBRARY_IMPL(llmcompress, CPU, m) {
    m.impl("group_gemm", &group_gemm);
    m.impl("moe_group_gemm", &moe_group_gemm);
}
