"""The operators that a saved model may name: functions of tensors and sizes, and nothing else.

Those with a row in `graphzip/ops`, what graphs are lowered to, and the ones listed here, which the analyzer pins but a
model may hold. An operator that changes the process, writes to its arguments or opens files is on none of the lists.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from graphzip.graph.torch_private import OpOverload
from graphzip.ops import OPS

__all__ = ["FUNCTIONS", "FUNCTION_NAMES", "aten_operators"]

_ARITHMETIC = ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pos", "abs", "pow")
_LOGIC = ("and_", "or_", "not_", "eq", "ne", "lt", "le", "gt", "ge")
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in _ARITHMETIC + _LOGIC},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum")
        if hasattr(torch, name)
    },
}
"""Functions on sizes, by the names that files have for them."""

FUNCTION_NAMES = {function: name for name, function in FUNCTIONS.items()}

_ALSO = """
absolute addbmm addmv addr adjoint affine_grid_generator aminmax angle arange arccos arccosh arcsin arcsinh arctan
arctan2 arctanh argwhere as_strided as_strided_scatter atleast_1d atleast_2d atleast_3d bartlett_window bernoulli
bilinear bincount bitwise_left_shift bitwise_right_shift blackman_window block_diag broadcast_tensors broadcast_to
bucketize cartesian_prod cdist channel_shuffle cholesky_inverse cholesky_solve clip column_stack combinations complex
conj conj_physical constant_pad_nd conv_depthwise3d conv_tbc convolution corrcoef cosine_similarity count_nonzero cov
cross cummax cummin cumulative_trapezoid degrees det diag diag_embed diagflat diagonal diagonal_scatter diff digamma
dist dsplit dstack embedding_bag empty empty_like empty_permuted empty_strided equal exponential eye fft_fft fft_fft2
fft_fftfreq fft_fftn fft_fftshift fft_hfft fft_hfft2 fft_hfftn fft_ifft fft_ifft2 fft_ifftn fft_ifftshift fft_ihfft
fft_ihfft2 fft_ihfftn fft_irfft fft_irfft2 fft_irfftn fft_rfft fft_rfft2 fft_rfftfreq fft_rfftn fix fliplr flipud
float_power fractional_max_pool2d fractional_max_pool3d frexp frobenius_norm full gather gcd ger greater greater_equal
grid_sampler grid_sampler_2d grid_sampler_3d gru_cell hamming_window hann_window histc hsplit hstack huber_loss i0
igamma igammac imag index_add index_copy index_fill index_put index_reduce inner inverse isclose isin isneginf
isposinf isreal istft item kaiser_window kl_div kron kthvalue l1_loss lcm ldexp less less_equal linalg_cholesky
linalg_cross linalg_det linalg_diagonal linalg_eig linalg_eigh linalg_eigvals linalg_eigvalsh linalg_inv linalg_inv_ex
linalg_lstsq linalg_lu linalg_lu_factor linalg_lu_solve linalg_matmul linalg_matrix_exp linalg_matrix_norm
linalg_matrix_power linalg_matrix_rank linalg_multi_dot linalg_norm linalg_pinv linalg_qr linalg_slogdet linalg_solve
linalg_solve_triangular linalg_svd linalg_svdvals linalg_vander linalg_vecdot linspace logaddexp2 logcumsumexp logdet
logspace lstm_cell lu_solve lu_unpack mH masked_scatter masked_select matrix_H matrix_exp matrix_power max_unpool2d
max_unpool3d meshgrid mode mse_loss msort multinomial nanmean nanmedian nanquantile nansum new_empty new_empty_strided
new_full new_ones new_zeros native_batch_norm native_channel_shuffle native_dropout native_group_norm
native_layer_norm native_norm negative nonzero nonzero_static norm_except_dim normal not_equal nuclear_norm numel
one_hot ones outer pairwise_distance pdist permute_copy pinverse poisson polar polygamma put quantile rad2deg rand
rand_like randint randint_like randn randn_like randperm range ravel real reflection_pad1d reflection_pad2d
reflection_pad3d renorm repeat_interleave replication_pad1d replication_pad2d replication_pad3d reshape_as
resolve_conj resolve_neg rnn_relu_cell rnn_tanh_cell rot90 row_stack rsplit scalar_tensor scatter scatter_add
scatter_reduce searchsorted segment_reduce signbit slogdet smooth_l1_loss soft_margin_loss special_airy_ai
special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1 special_digamma special_entr special_erf
special_erfc special_erfcx special_erfinv special_exp2 special_expit special_expm1 special_gammainc special_gammaincc
special_gammaln special_i0 special_i0e special_i1 special_i1e special_log1p special_log_ndtr special_log_softmax
special_logit special_logsumexp special_ndtr special_ndtri special_polygamma special_psi special_round special_sinc
special_softmax special_xlog1py special_xlogy special_zeta std_mean stft sum_to_size svd sym_numel sym_size
sym_storage_offset sym_stride take take_along_dim tensordot trace trapezoid trapz triangular_solve tril tril_indices
triu triu_indices unique_consecutive unique_dim uniform unsafe_chunk unsafe_split unsafe_split_with_sizes vander
var_mean view_as view_as_complex view_as_real vsplit vstack zeros _adaptive_avg_pool2d _adaptive_avg_pool3d
_assert_tensor_metadata _batch_norm_impl_index _cdist_forward _convolution _embedding_bag _euclidean_dist _fft_c2c
_fft_c2r _fft_r2c _grouped_mm _linalg_det _linalg_eigh _linalg_slogdet _linalg_svd _local_scalar_dense _log_softmax
_native_batch_norm_legit _native_batch_norm_legit_functional _native_batch_norm_legit_no_training
_pack_padded_sequence _pad_packed_sequence _pdist_forward _prelu_kernel _reshape_alias _safe_softmax
_scaled_dot_product_attention_math _scaled_dot_product_flash_attention_for_cpu _shape_as_tensor _softmax
_thnn_fused_gru_cell _thnn_fused_lstm_cell _trilinear _unique2 _unsafe_index __and__ __lshift__ __or__ __rshift__
__xor__ _unsafe_index_put _unsafe_masked_index _weight_norm _weight_norm_interface full_like ones_like zeros_like
"""
"""Names of further functions of tensors; each stands for those of its overloads that write nowhere."""


@functools.cache
def aten_operators() -> dict[str, OpOverload]:
    """Every operator that a file may name, by its full name (`aten.relu.default`): of ATen, and graphzip's own."""
    packets = [getattr(torch.ops.aten, name, None) for name in _ALSO.split()]
    also = [getattr(packet, overload) for packet in packets if packet is not None for overload in packet.overloads()]
    known = [target for target in OPS if isinstance(target, OpOverload)]
    return {str(target): target for target in (*known, *also) if _is_function(target)}


def _is_function(target: OpOverload) -> bool:
    return target.namespace in {"aten", "graphzip"} and not target._schema.is_mutable
