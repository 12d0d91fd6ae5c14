// Python module tulu_hpc.kernels._core: the C ABI with addresses as integers. Callers check shapes, dtypes and devices.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "tulu_core.h"

namespace py = pybind11;
using Address = std::uintptr_t;

namespace {

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

py::dict build_info() {
  py::dict info;
  info["cuda"] = TULU_ARCHITECTURES[0] != '\0';
  info["cuda_architectures"] = TULU_ARCHITECTURES;
  info["openmp"] = tulu_has_openmp() != 0;
  info["cpu_isas"] = std::string(tulu_cpu_isas());
  info["compiler"] = TULU_COMPILER;
  return info;
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "Compiled core of tulu_hpc.kernels (C ABI, see csrc/include/tulu_core.h)";
  module.def("build_info", &build_info);
  module.def("error_string", [](int code) { return std::string(tulu_error_string(code)); });
  module.def("set_cpu_isa", [](const std::string& name) { return tulu_set_cpu_isa(name.c_str()); });
  module.def("linear_logprob_forward_cpu",
             [](Address logits, int64_t ld, int64_t rows, int64_t cols, int64_t first, Address target, Address row_start,
                Address maximum, Address sum, Address dot, Address picked, float inv_temperature, float softcap, int threads) {
               py::gil_scoped_release release;
               return tulu_linear_logprob_forward_cpu(at<float>(logits), ld, rows, cols, first, at<int64_t>(target),
                                                      at<int64_t>(row_start), at<float>(maximum), at<float>(sum),
                                                      at<float>(dot), at<float>(picked), inv_temperature, softcap, threads);
             });
  module.def("linear_logprob_backward_cpu",
             [](Address logits, int64_t ld, Address logits_row, Address out, int64_t ld_out, int64_t rows, int64_t cols,
                int64_t first, Address target, Address row_start, Address stats, Address grad, float inv_temperature,
                float softcap, int threads) {
               py::gil_scoped_release release;
               return tulu_linear_logprob_backward_cpu(at<float>(logits), ld, at<int64_t>(logits_row), at<float>(out), ld_out,
                                                       rows, cols, first, at<int64_t>(target), at<int64_t>(row_start),
                                                       at<float>(stats), at<float>(grad), inv_temperature, softcap, threads);
             });
#ifdef TULU_WITH_CUDA
  module.def("linear_logprob_forward_cuda",
             [](Address logits, int64_t ld, int64_t rows, int64_t cols, int64_t first, Address target, Address row_start,
                Address maximum, Address sum, Address dot, Address picked, float inv_temperature, float softcap,
                Address stream) {
               py::gil_scoped_release release;
               return tulu_linear_logprob_forward_cuda(at<float>(logits), ld, rows, cols, first, at<int64_t>(target),
                                                       at<int64_t>(row_start), at<float>(maximum), at<float>(sum),
                                                       at<float>(dot), at<float>(picked), inv_temperature, softcap,
                                                       at<void>(stream));
             });
  module.def("linear_logprob_backward_cuda",
             [](Address logits, int64_t ld, Address logits_row, Address out, int64_t ld_out, bool out_is_bf16, int64_t rows,
                int64_t cols, int64_t first, Address target, Address row_start, Address stats, Address grad,
                float inv_temperature, float softcap, Address stream) {
               py::gil_scoped_release release;
               return tulu_linear_logprob_backward_cuda(at<float>(logits), ld, at<int64_t>(logits_row), at<void>(out), ld_out,
                                                        out_is_bf16, rows, cols, first, at<int64_t>(target),
                                                        at<int64_t>(row_start), at<float>(stats), at<float>(grad),
                                                        inv_temperature, softcap, at<void>(stream));
             });
#endif
}
