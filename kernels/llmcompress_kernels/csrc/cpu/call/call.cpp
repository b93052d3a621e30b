// A packed weight as an object that Python calls with one tensor. Calling the operator takes 2.5 us from the cache and up to
// 6 us behind a weight that has just passed through it, since eight arguments are matched with a schema, boxed and unboxed,
// where a product of one token may take 10 us itself. This call looks at nothing but its input. It covers what needs no
// dispatcher, a plain CPU tensor outside every mode, and hands all else to the operator.
//
// Of libtorch_python it uses one function, declared here: the header that declares it takes 12 s to compile.
#include <Python.h>

#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <ATen/record_function.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <cstddef>
#include <exception>
#include <new>
#include <optional>

#include "../gemm/linear.h"

PyObject* THPVariable_Wrap(const at::TensorBase& tensor);

namespace {

namespace lc = llmcompress;
using at::Tensor;

// multiply-adds from which other Python threads may run meanwhile, some 100 us
constexpr int64_t LONG_WORK = int64_t(1) << 25;

// llmcompress_linear of the gemm library.
using Linear = void (*)(const lc::Operand&, const void*, lc::Type, int64_t, int, void*);

Linear linear = nullptr;
PyTypeObject* tensor_type = nullptr;
PyObject* cdata_name = nullptr;

struct Product {
    PyObject_HEAD
    vectorcallfunc call;
    PyObject* otherwise;  // Python's call of the operator
    lc::Operand shape;    // without its pointers
    bool int8;
    Tensor packed, scale, zero;  // zero undefined on a symmetric grid
};

// The pointer behind a Python tensor, as its attribute `_cdata` tells it: where it lies in the object differs by version.
c10::TensorImpl* implementation(PyObject* x) {
    PyObject* number = PyObject_GetAttr(x, cdata_name);
    if (!number) return nullptr;
    void* const found = PyLong_AsVoidPtr(number);
    Py_DECREF(number);
    return static_cast<c10::TensorImpl*>(found);
}

Tensor borrowed(c10::TensorImpl* x) { return Tensor(c10::intrusive_ptr<c10::TensorImpl>::reclaim_copy(x)); }

// No mode, transform, subclass, profiler or gradient that the dispatcher would have to serve.
bool plain(const Tensor& x) {
    using K = c10::DispatchKey;
    constexpr c10::DispatchKeySet own({K::CPU, K::ADInplaceOrView, K::AutogradCPU, K::AutocastCPU});
    constexpr c10::DispatchKeySet idle({K::BackendSelect, K::ADInplaceOrView, K::AutocastCPU});
    return (x.key_set() | own) == own && x.key_set().has(K::CPU) &&
           (c10::impl::tls_local_dispatch_key_set().included_ | idle) == idle &&
           !(x.requires_grad() && c10::GradMode::is_enabled()) && at::impl::PythonTorchFunctionTLS::stack_len() == 0 &&
           !at::hasCallbacks();
}

std::optional<lc::Type> type_of(const Tensor& x) {
    switch (x.scalar_type()) {
        case at::kFloat: return lc::FP32;
        case at::kBFloat16: return lc::BF16;
        case at::kHalf: return lc::FP16;
        default: return std::nullopt;
    }
}

// The product, an undefined tensor where the operator has to be called.
Tensor multiply(const Product& p, const Tensor& x) {
    const auto type = type_of(x);
    if (!type || !plain(x) || x.dim() == 0 || x.size(-1) != p.shape.columns || !x.is_contiguous() || x.numel() == 0) return {};
    lc::Operand w = p.shape;
    w.packed = static_cast<const uint32_t*>(p.packed.const_data_ptr());
    w.scale = static_cast<const uint16_t*>(p.scale.const_data_ptr());
    w.zero = p.zero.defined() ? static_cast<const uint32_t*>(p.zero.const_data_ptr()) : nullptr;
    if (!w.packed || !w.scale || (p.zero.defined() && !w.zero)) return {};
    at::DimVector shape(x.sizes());
    shape.back() = w.rows;
    Tensor out = at::detail::empty_cpu(shape, x.scalar_type(), false, std::nullopt);
    const int64_t tokens = x.numel() / w.columns;
    const int planes = p.int8 ? 1 : *type == lc::FP32 ? 3 : 2;
    const bool let_go = tokens * w.rows * w.columns >= LONG_WORK;
    PyThreadState* const state = let_go ? PyEval_SaveThread() : nullptr;
    std::exception_ptr failed;
    try {
        linear(w, x.const_data_ptr(), *type, tokens, planes, out.mutable_data_ptr());
    } catch (...) {
        failed = std::current_exception();
    }
    if (let_go) PyEval_RestoreThread(state);
    if (failed) std::rethrow_exception(failed);
    return out;
}

PyObject* call(PyObject* self, PyObject* const* arguments, size_t count, PyObject* names) {
    const Product& p = *reinterpret_cast<Product*>(self);
    if (PyVectorcall_NARGS(count) == 1 && !names && Py_TYPE(arguments[0]) == tensor_type) {
        c10::TensorImpl* const x = implementation(arguments[0]);
        if (!x) return nullptr;
        try {
            const Tensor out = multiply(p, borrowed(x));
            if (out.defined()) return THPVariable_Wrap(out);
        } catch (const std::bad_alloc&) {
            return PyErr_NoMemory();
        } catch (const std::exception& error) {
            PyErr_SetString(PyExc_RuntimeError, error.what());
            return nullptr;
        }
    }
    return PyObject_Vectorcall(p.otherwise, arguments, count, names);
}

void free_product(PyObject* self) {
    auto* const p = reinterpret_cast<Product*>(self);
    Py_XDECREF(p->otherwise);
    p->packed.~Tensor();
    p->scale.~Tensor();
    p->zero.~Tensor();
    PyObject_Free(self);
}

PyTypeObject product_type = {PyVarObject_HEAD_INIT(nullptr, 0)};

}  // namespace

// Hand over what the calls use: `multiply_by` is llmcompress_linear, `type` torch.Tensor. Returns 0, or -1 with an error set.
extern "C" __attribute__((visibility("default"))) int llmcompress_call_start(void* multiply_by, PyObject* type) {
    linear = reinterpret_cast<Linear>(multiply_by);
    tensor_type = reinterpret_cast<PyTypeObject*>(Py_NewRef(type));
    cdata_name = PyUnicode_InternFromString("_cdata");
    product_type.tp_name = "llmcompress_kernels.Product";
    product_type.tp_doc = "A packed weight: called with x [..., K], it returns x Wᵀ [..., N].";
    product_type.tp_basicsize = sizeof(Product);
    product_type.tp_flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_HAVE_VECTORCALL;
    product_type.tp_vectorcall_offset = offsetof(Product, call);
    product_type.tp_call = PyVectorcall_Call;
    product_type.tp_dealloc = free_product;
    return cdata_name ? PyType_Ready(&product_type) : -1;
}

// A new object for an interleaved weight; the tensors are kept, `zero` may be None. `otherwise` is called with what this
// does not cover.
extern "C" __attribute__((visibility("default"))) PyObject* llmcompress_call_product(PyObject* packed, PyObject* scale,
                                                                                     PyObject* zero, int bits, int64_t group,
                                                                                     int64_t columns, int int8,
                                                                                     PyObject* otherwise) {
    c10::TensorImpl* const parts[] = {implementation(packed), implementation(scale),
                                      zero == Py_None ? nullptr : implementation(zero)};
    if (PyErr_Occurred()) return nullptr;
    auto* const p = PyObject_New(Product, &product_type);
    if (!p) return nullptr;
    p->call = call;
    p->otherwise = Py_NewRef(otherwise);
    new (&p->packed) Tensor(borrowed(parts[0]));
    new (&p->scale) Tensor(borrowed(parts[1]));
    new (&p->zero) Tensor(parts[2] ? borrowed(parts[2]) : Tensor());
    p->shape = {nullptr, nullptr, nullptr, p->packed.size(0) * lc::LANES, columns, group, bits, true};
    p->int8 = int8 != 0;
    return reinterpret_cast<PyObject*>(p);
}
