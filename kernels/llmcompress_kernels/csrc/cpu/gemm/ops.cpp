// The operators as PyTorch sees them, through its stable ABI: they need no rebuild for another Python, and 2 s to compile.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "linear.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace lc = llmcompress;

std::optional<lc::Type> type_of(const Tensor& x) {
    switch (x.scalar_type()) {
        case ScalarType::Float: return lc::FP32;
        case ScalarType::BFloat16: return lc::BF16;
        case ScalarType::Half: return lc::FP16;
        default: return std::nullopt;
    }
}

int planes_of(lc::Type type, bool int8) { return int8 ? 1 : type == lc::FP32 ? 3 : 2; }

template <typename T>
const T* data(const Tensor& x) {
    return static_cast<const T*>(x.data_ptr());
}

bool plain(const std::optional<Tensor>& x, ScalarType type) {
    return !x || (x->is_contiguous() && x->scalar_type() == type && x->is_cpu());
}

// The definition, for what the kernels decline.
template <typename... Args>
Tensor definition(const char* name, const Args&... args) {
    std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor group_gemm(Tensor x, Tensor packed, Tensor scale, std::optional<Tensor> zero, int64_t bits, int64_t group,
                  int64_t columns, bool int8) {
    const auto type = type_of(x);
    const bool interleaved = packed.dim() == 3;
    const int64_t rows = interleaved ? packed.size(0) * lc::LANES : packed.size(0);
    const int64_t words = (columns * bits + 31) / 32;
    const bool runs = type && plain(packed, ScalarType::Int) && plain(scale, ScalarType::Half) &&
                      plain(zero, ScalarType::Int) && !lc::declined(int(bits), group, columns) && x.dim() > 0 &&
                      x.size(x.dim() - 1) == columns && packed.size(1) == words && scale.dim() == packed.dim();
    if (!runs) return definition("llmcompress::group_gemm_definition", x, packed, scale, zero, bits, group, columns, int8);
    const Tensor input = torch::stable::contiguous(x);
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = rows;
    Tensor out = torch::stable::new_empty(x, shape);
    const int64_t tokens = x.numel() / columns;
    if (tokens > 0 && rows > 0) {
        const lc::Operand w{data<uint32_t>(packed), data<uint16_t>(scale), zero ? data<uint32_t>(*zero) : nullptr,
                            rows, columns, group, int(bits), interleaved};
        lc::linear(w, input.data_ptr(), *type, tokens, planes_of(*type, int8), out.data_ptr());
    }
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(llmcompress, CPU, m) { m.impl("group_gemm", TORCH_BOX(&group_gemm)); }
