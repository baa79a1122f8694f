import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fista_modifier.solver import NofM, Unstructured, Within, parse_pattern, pattern_of
from fista_modifier.solver.patterns import project

N_OF_M = ["1:2", "1:4", "2:4", "3:4", "4:4", "4:8"]


def random_weight(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.66, 0.99])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (16, 24)])
def test_unstructured_zeros_are_exact_and_the_smallest(sparsity, shape):
    weight = random_weight(*shape)
    pattern = Unstructured(sparsity)
    rounded = project(weight, pattern)
    zeros = round(sparsity * weight.numel())
    assert int((rounded == 0).sum()) == zeros
    assert pattern.holds(rounded)
    expected = weight.flatten().clone()
    expected[weight.abs().flatten().argsort()[:zeros]] = 0
    assert torch.equal(rounded.flatten(), expected)


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5])
def test_unstructured_zeros_are_exact_among_ties(value, sparsity):
    scores = torch.full((4, 5), value)
    kept = Unstructured(sparsity).support(scores)
    assert int((~kept).sum()) == round(sparsity * 20)


def test_unstructured_ties_at_the_threshold_only_fill_the_count():
    scores = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0, 2.0]])
    kept = Unstructured(0.5).support(scores)
    assert kept[0, 0] and kept[0, 5] and not kept[0, 4]
    assert int(kept.sum()) == 3


@pytest.mark.parametrize("mask_structure", N_OF_M)
def test_n_of_m_keeps_the_largest_n_of_each_group(mask_structure):
    n, m = map(int, mask_structure.split(":"))
    weight = random_weight(6, 16)
    pattern = NofM(n, m)
    groups = project(weight, pattern).view(6, -1, m)
    assert bool(((groups != 0).sum(-1) == n).all())
    assert pattern.holds(groups.view(6, 16))
    magnitudes = weight.view(6, -1, m).abs()
    smallest_kept = magnitudes.where(groups != 0, torch.inf).amin(-1)
    largest_pruned = magnitudes.where(groups == 0, 0).amax(-1)
    assert bool((smallest_kept > largest_pruned).all())


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_n_of_m_zeros_are_exact_among_ties(value):
    kept = NofM(2, 4).support(torch.full((3, 8), value))
    assert bool((kept.view(3, 2, 4).sum(-1) == 2).all())


def test_a_weight_with_one_entry_too_many_does_not_hold():
    weight = torch.tensor([[1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0]])
    assert not NofM(2, 4).holds(weight)
    assert NofM(3, 4).holds(weight)
    assert Unstructured(0.5).holds(weight)
    assert not Unstructured(0.51 + 1 / 8).holds(weight)


def test_fewer_non_zeros_than_allowed_hold():
    assert NofM(2, 4).holds(torch.zeros(2, 4))
    assert Unstructured(0.5).holds(torch.zeros(2, 4))


@pytest.mark.parametrize("mask_structure", N_OF_M)
def test_n_of_m_fixes_the_sparsity(mask_structure):
    n, m = map(int, mask_structure.split(":"))
    assert parse_pattern(mask_structure, None) == NofM(n, m)
    assert parse_pattern(mask_structure, 1 - n / m) == NofM(n, m)
    assert parse_pattern(mask_structure, None).sparsity == 1 - n / m


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.999])
def test_0_of_0_is_unstructured(sparsity):
    assert parse_pattern("0:0", sparsity) == Unstructured(sparsity)


@pytest.mark.parametrize(
    "text, pattern",
    [
        ("2:4", NofM(2, 4)),
        ("0.5", Unstructured(0.5)),
        ("50 %", Unstructured(0.5)),
        ("50%", Unstructured(0.5)),
        ("0", Unstructured(0)),
    ],
)
def test_a_pattern_is_named_by_n_of_m_or_a_sparsity(text, pattern):
    assert pattern_of(text) == pattern
    assert parse_pattern(text, None) == pattern


def test_what_names_no_pattern_is_told_how_they_are_named():
    with pytest.raises(ValueError, match="'2:4', or a sparsity .* 0.5; got 'half'"):
        pattern_of("half")


@pytest.mark.parametrize(
    "sparsity, name",
    [(0.5, "50 %"), (0, "0 %"), (0.07, "7 %"), (0.125, "12.5 %"), (1e-7, "0.00001 %")],
)
def test_usual_sparsities_have_short_names(sparsity, name):
    assert str(Unstructured(sparsity)) == name


@given(st.floats(0, 1, exclude_max=True))
def test_a_sparsity_comes_back_from_its_name_exactly(sparsity):
    assert pattern_of(str(Unstructured(sparsity))) == Unstructured(sparsity)


@given(st.integers(1, 512), st.integers(0, 512))
def test_n_of_m_comes_back_from_its_name(kept, pruned):
    pattern = NofM(kept, kept + pruned)
    assert pattern_of(str(pattern)) == pattern


def test_a_pattern_within_zeros_tells_kernels_of_the_pattern_asked_for():
    pattern = Within(NofM(2, 4), torch.ones(1, 4, dtype=torch.bool))
    assert pattern.group == (2, 4)
    assert (str(pattern), pattern.tag) == ("2:4", "2of4")


@pytest.mark.parametrize(
    "mask_structure, sparsity, named, fix",
    [
        ("5:4", None, "'5:4'", "1 <= n <= m"),
        ("0:4", None, "'0:4'", "1 <= n <= m"),
        ("2:0", None, "'2:0'", "1 <= n <= m"),
        ("2", None, "mask_structure", "got 2.0; write 0.02"),
        ("60 %", 0.5, "mask_structure '60 %'", "write 0.6"),
        ("", None, "''", "'2:4'"),
        ("-2:4", None, "'-2:4'", "'2:4'"),
        ("2:4 ", None, "'2:4 '", "'2:4'"),
        ("0:0", 50, "got 50", "write 0.5"),
        ("0:0", -0.1, "got -0.1", "[0, 1)"),
        ("0:0", 1.0, "got 1.0", "[0, 1)"),
        ("0:0", float("nan"), "got nan", "[0, 1)"),
        ("0:0", None, "sparsity is missing", "sparsity: 0.5"),
        ("1:4", 0.5, "sparsity 0.5 contradicts mask_structure '1:4'", "write 0.75"),
        ("1:4", 0.25, "sparsity 0.25 contradicts", "'3:4' prunes 1 of 4"),
    ],
)
def test_what_cannot_be_a_pattern_is_named_with_its_fix(
    mask_structure, sparsity, named, fix
):
    with pytest.raises(ValueError) as caught:
        parse_pattern(mask_structure, sparsity)
    assert named in str(caught.value)
    assert fix in str(caught.value)


def test_a_width_that_m_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="'2:3' .* divisible by 3, got 4; .*ignore"):
        NofM(2, 3).check_columns(4)
    NofM(2, 3).check_columns(6)
    Unstructured(0.5).check_columns(7)
