import random

import pytest

from llmcompress.data.problems.columns import column_product, column_sum


@pytest.mark.parametrize(
    ("write", "a", "b", "text"),
    [
        (column_sum, 3, 4, "3+4=7"),
        (column_sum, 227, 136, "227+136: 7+6=13, 2+3+1=6, 2+1=3, 363"),
        (column_sum, 2381, 4, "2381+4: 1+4=5, 8+0=8, 3+0=3, 2+0=2, 2385"),
        (column_sum, 4, 96, "4+96: 4+6=10, 0+9+1=10, 100"),
        (column_sum, -3, 120, "-3+120=117"),
        (column_product, 7, 8, "7*8=56"),
        (column_product, 8, 79, "8*9=72, 8*7=56, 56+7=63, 632"),
        (column_product, 79, 8, "8*9=72, 8*7=56, 56+7=63, 632"),
        (column_product, 6, 40, "6*0=0, 6*4=24, 240"),
        (column_product, 14, 12, "14*2=28, 14*1=14, 14+2=16, 168"),
        (column_product, 6, -12, "6*-12=-72"),
    ],
)
def test_sums_and_products_are_told_from_the_right(write, a, b, text):
    assert write(a, b) == text


def test_every_step_is_true_and_small_and_leaves_a_digit():
    rng = random.Random(0)
    for _ in range(500):
        a, b, factor = rng.randint(10, 10**6), rng.randint(10, 10**6), rng.randint(2, 9)
        for text, result in ((column_sum(a, b), a + b), (column_product(factor, a), factor * a)):
            *told, last = text.split(": ")[-1].split(", ")
            assert int(last) == result
            found = []
            for step in told:
                left, value = step.split("=")
                terms = [[int(n) for n in term.split("*")] for term in left.split("+")]
                assert sum(term[0] * (term[1] if len(term) > 1 else 1) for term in terms) == int(value) < 100
                carried = "*" not in left and text.count("*")
                # a carry is added to the product before it
                found = [*found[: -1 if carried else None], value[-1]]
            # what the columns leave is the result, but for the last carry
            assert str(result).endswith("".join(reversed(found))) and len(str(result)) <= len(found) + 1
