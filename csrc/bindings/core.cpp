// Python module tulu_hpc.kernels._core: the C ABI with addresses as integers. Callers check shapes, dtypes and devices.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
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
  module.def("preference_loss_cpu",
             [](Address logprobs, Address sequence_id, Address policy_sums, Address reference, Address lengths, Address pairs,
                Address weights, Address alignment, int64_t tokens, int64_t sequences, int64_t pair_count, int code, bool mean,
                bool subtract, bool round_to_float, bool wpo, double beta, double softplus_down, double softplus_up,
                double margin_shift, double sft_weight, double desirable_weight, double undesirable_weight, double kl,
                double odds_limit, Address coefficients, Address metrics, int threads) {
               py::gil_scoped_release release;
               const TuluPreference problem{at<float>(logprobs), at<int64_t>(sequence_id), at<double>(policy_sums),
                                            at<double>(reference), at<double>(lengths), at<int64_t>(pairs),
                                            at<double>(weights), at<double>(alignment), tokens, sequences, pair_count, code,
                                            mean, subtract, round_to_float, wpo, beta, softplus_down, softplus_up,
                                            margin_shift, sft_weight, desirable_weight, undesirable_weight, kl, odds_limit};
               return tulu_preference_loss_cpu(&problem, at<float>(coefficients), at<double>(metrics), threads);
             });
  // arrays, modes and numbers in the order of the structs
  module.def("policy_loss_cpu", [](const std::array<Address, 14>& a, const std::array<int, 6>& modes,
                                   const std::array<float, 8>& numbers, int64_t tokens, int64_t sequences, int threads) {
    py::gil_scoped_release release;
    const TuluPolicyArrays arrays{at<float>(a[0]), at<float>(a[1]), at<float>(a[2]),   at<int64_t>(a[3]), at<float>(a[4]),
                                    at<float>(a[5]), at<float>(a[6]), at<float>(a[7]),   at<float>(a[8]),   at<float>(a[9]),
                                    at<float>(a[10]), at<uint8_t>(a[11]), at<float>(a[12]), at<float>(a[13])};
    const TuluPolicySettings settings{modes[0],   modes[1],   modes[2],   modes[3],   modes[4],   modes[5],   numbers[0],
                                        numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], numbers[6], numbers[7]};
    return tulu_policy_loss_cpu(&arrays, &settings, tokens, sequences, threads);
  });
  module.def("value_loss_cpu", [](Address values, Address old_values, Address returns, Address weights, int64_t tokens,
                                  float clip, float scale, Address gradient, Address loss, Address sums, int threads) {
    py::gil_scoped_release release;
    return tulu_value_loss_cpu(at<float>(values), at<float>(old_values), at<float>(returns), at<float>(weights), tokens, clip,
                               scale, at<float>(gradient), at<float>(loss), at<float>(sums), threads);
  });
  module.def("gae_cpu", [](Address rewards, Address values, Address starts, Address bootstrap, int64_t segments, float gamma,
                           float lambda, Address advantages, Address returns, int threads) {
    py::gil_scoped_release release;
    return tulu_gae_cpu(at<float>(rewards), at<float>(values), at<int64_t>(starts), at<float>(bootstrap), segments, gamma,
                        lambda, at<float>(advantages), at<float>(returns), threads);
  });
  module.def("gated_forward_cpu", [](Address both, Address out, int64_t rows, int64_t width, int threads) {
    py::gil_scoped_release release;
    return tulu_gated_forward_cpu(at<float>(both), at<float>(out), rows, width, threads);
  });
  module.def("gated_backward_cpu", [](Address both, Address grad, Address grad_both, Address out, int64_t rows, int64_t width,
                                      int threads) {
    py::gil_scoped_release release;
    return tulu_gated_backward_cpu(at<float>(both), at<float>(grad), at<float>(grad_both), at<float>(out), rows, width,
                                   threads);
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
