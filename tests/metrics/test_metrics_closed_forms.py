"""Every measure in cases whose value is known without the code; the table is in forms.py."""

import numpy as np
import pytest

from driftlens import metrics as m
from tests.metrics.forms import CLOSED_FORMS, Form

CASES = [pytest.param(form, id=f"{name}: {form.text}") for name, forms in CLOSED_FORMS.items() for form in forms]


@pytest.mark.parametrize("form", CASES)
def test_closed_form(form: Form) -> None:
    found = np.asarray(form.found(), dtype=float)
    assert found.shape == np.shape(form.wanted)
    np.testing.assert_allclose(found, np.asarray(form.wanted, dtype=float), rtol=1e-7, atol=1e-12, equal_nan=True)


def test_every_measure_has_a_closed_form_that_is_more_than_nothing() -> None:
    assert set(CLOSED_FORMS) == set(m.COMPUTED_BY)
    for name, forms in CLOSED_FORMS.items():
        values = np.concatenate([np.ravel(np.asarray(form.wanted, dtype=float)) for form in forms])
        assert (
            len(forms) > 1 or np.nansum(np.abs(values)) > 0 or name in {"update_norm_anchor", "router_change_centred"}
        )
