import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ig_jax import tables
from ig_jax.diffusion import guidance as g
from ig_jax.diffusion import interpolant
from ig_jax.diffusion.field import GuidedVelocity
from ig_jax.diffusion.guidance import Guidance, GuidanceOptions, Pass, Term
from ig_jax.errors import InputError
from ig_jax.models.network import Heads
from tests.common import golden, nhwc, relative_error

COND, NULL = Pass(), Pass(null=True)


@pytest.fixture(scope="module")
def heads():
    """Random predictions of a network with two auxiliary heads, at the labels and at ∅."""
    a = jax.random.normal(jax.random.key(0), (7, 3, 2, 2, 4))
    return {
        COND: Heads(a[0], (a[1], a[2])),
        NULL: Heads(a[3], (a[4], a[5])),
        Pass(null=True, upto=1): Heads(None, (a[4], a[5])),
        Pass("weaker"): Heads(a[6]),
    }


def combine(guidance, heads, t=0.5):
    return g.combine(guidance.terms, heads, jnp.float32(t))


def line(weak, strong, scale):
    return weak + scale * (strong - weak)


def test_ig_inside_cfg_is_the_papers_formula(heads):
    w, s = 1.7, 1.3
    cond, null = (line(heads[p].auxiliary[0], heads[p].final, w) for p in (COND, NULL))
    np.testing.assert_allclose(combine(Guidance(w), heads), cond, rtol=1e-5, atol=1e-5)
    both = combine(Guidance(w, cfg_scale=s), heads)
    np.testing.assert_allclose(both, line(null, cond, s), rtol=1e-5, atol=1e-5)
    # Written as terms it is the same program; the other way round it is another guidance.
    ig, cfg = Term(g.Auxiliary(), w), Term(g.Null(), s)
    np.testing.assert_array_equal(combine(Guidance.of(ig, cfg), heads), both)
    outside = line(heads[COND].auxiliary[0], line(heads[NULL].final, heads[COND].final, s), w)
    np.testing.assert_allclose(combine(Guidance.of(cfg, ig), heads), outside, rtol=1e-5, atol=1e-5)


def test_every_weak_source(heads):
    w, cond, null = 1.6, heads[COND], heads[NULL]
    cases = [
        (g.Auxiliary(0), cond.auxiliary[0]),
        (g.Auxiliary(1), cond.auxiliary[1]),
        (g.Mixed(), (cond.auxiliary[0] + cond.auxiliary[1]) / 2),
        (g.Mixed(weights=(1, 3)), 0.25 * cond.auxiliary[0] + 0.75 * cond.auxiliary[1]),
        (g.Mixed(head=1, weights=(2.0,)), cond.auxiliary[1]),
        (g.Null(), null.final),
        (g.ShallowNull(head=1), null.auxiliary[1]),
        (g.Weaker(graph=lambda *_: None), heads[Pass("weaker")].final),
    ]
    for source, weak in cases:
        term = Term(source, w)
        np.testing.assert_allclose(
            combine(Guidance.of(term), heads), line(weak, cond.final, w), rtol=1e-5, atol=1e-5
        )
        assert set(g.needed([term])) <= set(heads)


def test_the_null_branch_may_have_a_scale_of_its_own(heads):
    guidance = Guidance.of(Term(g.Auxiliary(), 1.8, null_scale=1.2), Term(g.Null(), 1.5))
    cond = line(heads[COND].auxiliary[0], heads[COND].final, 1.8)
    null = line(heads[NULL].auxiliary[0], heads[NULL].final, 1.2)
    np.testing.assert_allclose(
        combine(guidance, heads), line(null, cond, 1.5), rtol=1e-5, atol=1e-5
    )


def test_guidance_of_three_channels_leaves_the_rest(heads):
    """As the published samplers of DiT and LightningDiT do."""
    guided = combine(Guidance.of(Term(g.Null(), 2.0, channels=3)), heads)
    everywhere = combine(Guidance.of(Term(g.Null(), 2.0)), heads)
    np.testing.assert_array_equal(guided[..., :3], everywhere[..., :3])
    np.testing.assert_array_equal(guided[..., 3:], heads[COND].final[..., 3:])


@pytest.mark.parametrize("rule", ["linear", "zero_star", "tangential", "projected", "rescaled"])
def test_scale_one_is_no_guidance_by_every_rule(heads, rule):
    rule = tables.make(g.RULES, rule, "rule")
    guided = combine(Guidance.of(Term(g.Auxiliary(), 1.0, rule=rule)), heads)
    np.testing.assert_allclose(guided, heads[COND].final, rtol=1e-5, atol=1e-6)
    if isinstance(rule, g.Linear):
        np.testing.assert_array_equal(guided, heads[COND].final)


def test_scale_zero_is_the_auxiliary_head(heads):
    np.testing.assert_allclose(
        combine(Guidance(0.0), heads), heads[COND].auxiliary[0], rtol=1e-5, atol=1e-6
    )


GOLDEN_RULES = {
    "linear": g.Linear(),
    "projected_eta0_norm0": g.Projected(),
    "projected_eta0.3_norm0": g.Projected(eta=0.3),
    "projected_eta0_norm2.5": g.Projected(norm=2.5),
    "projected_eta1_norm2.5": g.Projected(eta=1.0, norm=2.5),
    "zero_star": g.ZeroStar(),
    "tangential": g.Tangential(),
    "rescaled_0.3": g.Rescaled(0.3),
    "rescaled_0.7": g.Rescaled(0.7),
}


@pytest.mark.parametrize("name", GOLDEN_RULES)
def test_rules_equal_diffusers(name):
    numbers = golden("guidance_rules")
    assert {k.split("/")[1] for k in numbers if k.startswith("outputs/")} == set(GOLDEN_RULES)
    weak, strong = (jnp.asarray(nhwc(numbers[f"inputs/{n}"])) for n in ("weak", "strong"))
    guided = GOLDEN_RULES[name](weak, strong, float(numbers["inputs/scale"]))
    # diffusers' rescaling divides by PyTorch's unbiased deviation on both sides: the same ratio.
    assert relative_error(guided, nhwc(numbers[f"outputs/{name}"])) < 1e-5


def test_what_is_off_is_not_in_the_tuple():
    assert Guidance().terms == ()
    assert len(Guidance(1.5).terms) == len(Guidance(cfg_scale=1.5).terms) == 1
    traced = jax.make_jaxpr(lambda w: len(Guidance(w).terms) * w)(1.0)
    assert traced.jaxpr.eqns  # a traced scale is always on


def test_intervals_are_inclusive_and_their_numbers_may_be_traced(heads):
    times = np.linspace(1, 0, 11)
    at = jax.jit(lambda guidance, t: g.combine(guidance.terms, heads, t))
    guidance = Guidance(1.5, (0.3, 0.7)).canonical(1)
    changed = [not np.array_equal(at(guidance, jnp.float32(t)), heads[COND].final) for t in times]
    np.testing.assert_array_equal(changed, (times > 0.25) & (times < 0.75))
    at(Guidance(1.7, (0.2, 0.6)).canonical(1), jnp.float32(0.5))
    assert at._cache_size() == 1


def test_a_ramp_scales_what_is_beyond_one(heads):
    guidance = Guidance.of(Term(g.Auxiliary(), 3.0, g.Ramp(0.2, 0.6)))
    weak, strong = heads[COND].auxiliary[0], heads[COND].final
    for t, scale in ((0.1, 1.0), (0.3, 1.5), (0.4, 2.0), (0.9, 3.0)):
        np.testing.assert_allclose(
            combine(guidance, heads, t), line(weak, strong, scale), rtol=1e-4, atol=1e-5
        )
    falling = g.Ramp(0.6, 0.2)
    np.testing.assert_allclose(falling(np.array([0.1, 0.4, 0.7])), [1, 0.5, 0])


def test_branches_are_decided_by_forward_passes_alone():
    times = np.linspace(1, 0, 11)[:-1, None]
    everywhere = Guidance(1.5, (0.3, 0.7)).branches(times)
    # Internal guidance is free, so its interval makes no other program.
    assert everywhere == ((((0,),)) * 1,) * 10
    cfg = Guidance(1.5, (0.3, 0.7), 2.0, (0.2, 0.6)).branches(times)
    assert [row[0] for row in cfg] == [(0, 1) if 0.15 < t < 0.65 else (0,) for t in times[:, 0]]
    assert Guidance().branches(times) == (((),),) * 10
    jax.jit(lambda gd: [] if gd.branches(times) == (((0, 1),),) * 10 else 1 / 0)(
        Guidance(1.5, (0.3, 0.7), 2.0, (0.2, 0.6)).canonical(1)
    )


def spying_field(guidance, calls):
    """A field whose networks note the labels and depth that they are asked for."""

    def network(x, t, y, upto=None):
        calls.append(("", np.asarray(y).tolist(), upto))
        value = x * (1 + y[:, None, None, None])
        count = 2 if upto is None else upto + 1
        final = value if upto is None else None
        return Heads(final, (value * 0.5, value * 0.75)[:count])

    return GuidedVelocity(
        network, jnp.array([1, 2]), 10, interpolant.get("linear"), "velocity", guidance
    )


def test_shallow_guidance_stops_at_the_head():
    calls = []
    field = spying_field(Guidance.of(Term(g.ShallowNull(), 2.0)), calls)
    x = jnp.ones((2, 1, 1, 1))
    out = field(x, jnp.full(2, 0.5)).velocity
    assert calls == [("", [10, 10], 0), ("", [1, 2], None)]
    weak, strong = 0.5 * 11, np.array([2.0, 3.0])
    np.testing.assert_allclose(out.ravel(), weak + 2 * (strong - weak))


def test_branches_of_one_network_ride_in_one_batch():
    calls = []
    spying_field(Guidance(1.5, cfg_scale=2.0), calls)(jnp.ones((2, 1, 1, 1)), jnp.full(2, 0.5))
    assert calls == [("", [1, 2, 10, 10], None)]


def test_a_weaker_network_replaces_the_auxiliary_head():
    def strong(x, t, y):
        return Heads(x, (x * 100,))

    def weak(x, t, y):
        return Heads(x * 0.5)

    field = GuidedVelocity(
        strong,
        jnp.zeros(2, jnp.int32),
        10,
        interpolant.get("linear"),
        "velocity",
        Guidance(2.0, weak=weak),
    )
    out = field(jnp.ones((2, 1, 1, 1)), jnp.full(2, 0.5))
    np.testing.assert_allclose(out.velocity, 0.5 + 2 * (1 - 0.5))


@pytest.mark.parametrize("path", list(interpolant.INTERPOLANTS))
def test_guiding_any_prediction_guides_the_velocity(path):
    """IG and CFG are affine, so they commute with converting predictions to velocity."""
    path = interpolant.get(path)
    t = jnp.array([0.3005, 0.6005])
    x_t, *values = jax.random.normal(jax.random.key(3), (5, 2, 2, 2, 1))
    guidance = Guidance(1.6, cfg_scale=1.4)

    def guided(values):
        return combine(
            guidance,
            {COND: Heads(values[0], (values[1],)), NULL: Heads(values[2], (values[3],))},
        )

    for prediction in ("noise", "data"):
        convert = lambda h, kind=prediction: interpolant.velocity_from(path, kind, h, x_t, t)  # noqa: E731
        np.testing.assert_allclose(
            convert(guided(values)), guided([convert(v) for v in values]), rtol=2e-3, atol=2e-3
        )


def test_two_heads_and_a_weaker_network_may_guide_one_after_the_other(heads):
    """Each where it acts: two heads at different noise levels, and internal on Autoguidance."""
    options = GuidanceOptions(
        2.0, (0.0, 0.4), 1.5, (0.6, 1.0),
        ig_source="auxiliary(head=0)", cfg_source="auxiliary(head=1)",
    )  # fmt: skip
    shallow, deep = heads[COND].auxiliary
    for t, weak, w in ((0.2, shallow, 2.0), (0.8, deep, 1.5)):
        expected = line(weak, heads[COND].final, w)
        np.testing.assert_allclose(combine(options.build(), heads, t), expected, rtol=1e-4)
    np.testing.assert_array_equal(combine(options.build(), heads, 0.5), heads[COND].final)
    weaker = g.Weaker(graph=lambda *_: None)
    pair = GuidanceOptions(2.0, cfg_scale=1.5, ig_source="auxiliary", cfg_source="weaker")
    inner = line(shallow, heads[COND].final, 2.0)
    expected = line(heads[Pass("weaker")].final, inner, 1.5)
    np.testing.assert_allclose(combine(pair.build(weaker), heads), expected, rtol=1e-4, atol=1e-5)
    alone = GuidanceOptions(2.0).build(weaker).terms
    assert [term.source for term in alone] == [weaker]  # "auto"


def test_options_stand_for_terms():
    assert GuidanceOptions().build().terms == ()
    options = GuidanceOptions(
        1.4,
        (0.3, 1.0),
        1.35,
        (0.0, 0.7),
        ig_source="auxiliary(head=1)",
        ig_rule="projected(eta=0.5, norm=15)",
        ig_null_scale="1.1",
        cfg_source="shallow",
        cfg_schedule="ramp(start=0.2, stop=0.8)",
        cfg_channels=3,
    )
    assert options.build().terms == (
        Term(g.Auxiliary(1), 1.4, g.Interval(0.3, 1.0), 1.1, g.Projected(0.5, 15)),
        Term(g.ShallowNull(), 1.35, g.Ramp(0.2, 0.8), None, g.Linear(), 3),
    )
    assert options.build().record()[0] == {
        "source": "auxiliary(head=1)",
        "rule": "projected(eta=0.5, norm=15)",
        "scale": 1.4,
        "when": "interval(low=0.3)",
        "null_scale": 1.1,
    }
    assert GuidanceOptions(ig_scale=1.0, ig_null_scale="1.2", cfg_scale=2.0).build().terms


BAD = [
    (lambda: Guidance(ig_interval=(0.7, 0.3)), "ig_interval is .*expected .low, high."),
    (lambda: Guidance(cfg_interval=(0.5,)), "cfg_interval is .*expected .low, high."),
    (lambda: Guidance(1.5, (-0.1, 1.0)), "ig_interval is .*expected .low, high."),
    (lambda: Guidance(float("nan")), "ig_scale is nan: expected a finite number"),
    (lambda: Term(g.Null(), float("inf")), "guidance scale is inf: expected a finite"),
    (lambda: g.Interval(0.5, 1.5), "interval is .0.5, 1.5.: expected"),
    (lambda: g.Ramp(0.5, 0.5), "ramp is .0.5, 0.5.: expected two different times"),
    (
        lambda: Guidance.of(Term(g.Null(), 2.0), Term(g.ShallowNull(), 2.0)),
        "two guidance terms claim the prediction at the null label",
    ),
    (lambda: Guidance(1.5).check(0, 10), "internal guidance needs auxiliary head 0.*has no aux"),
    (lambda: Guidance.of(Term(g.Auxiliary(2))).check(2, 10), "head 2 of this model: it has 2"),
    (lambda: Guidance.of(Term(g.Mixed())).check(1, 10), "head 1 of this model: it has 1"),
    (lambda: Guidance.of(Term(g.Mixed(weights=(1, -1)))).check(2, 10), "mixed weights are .1, -1"),
    (lambda: Guidance(cfg_scale=1.5).check(1, 0), "needs a null label ∅: .* is unconditional"),
    (lambda: Guidance.of(Term(g.ShallowNull())).check(0, 10), "shallow guidance needs auxiliary"),
    (lambda: Guidance.of(Term(g.Weaker())).check(1, 10), "weaker network needs one: none"),
    (
        lambda: GuidanceOptions(2.0, ig_rule="projcted").build(),
        "ig_rule is 'projcted': expected one of linear, .*did you mean projected",
    ),
    (
        lambda: GuidanceOptions(2.0, ig_rule="projected(etaa=1)").build(),
        "projected has no option 'etaa', its options are eta, norm",
    ),
    (lambda: GuidanceOptions(2.0, ig_rule="linear(1)").build(), "expected a name, or name.option"),
    (lambda: GuidanceOptions(2.0, ig_rule="a.b(").build(), "expected a name, or name.option"),
    (lambda: GuidanceOptions(2.0, ig_null_scale="x").build(), "ig_null_scale is 'x': expected"),
]


@pytest.mark.parametrize("make,message", BAD, ids=[message for _, message in BAD])
def test_bad_guidance_is_one_line(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    "table,row",
    [
        (g.RULES, g.Projected(eta=0.25)),
        (g.RULES, g.Linear()),
        (g.SCHEDULES, g.Ramp(0.1, 0.9)),
        (g.SOURCES, g.ShallowNull(head=2)),
        (g.SOURCES, g.Mixed(weights=(1.0, 3.0))),
    ],
)
def test_rows_are_spelt_as_they_are_made(table, row):
    assert tables.make(table, tables.spell(table, row), "row") == row


def test_settings_that_make_the_same_passes_have_one_canonical_form(heads):
    settings = [Guidance(), Guidance(1.0), Guidance(1.7), Guidance(0.0, (0.3, 0.6))]
    structures = {jax.tree.structure(setting.canonical(2)) for setting in settings}
    assert len(structures) == 1
    for setting in settings:
        canonical = combine(setting.canonical(2), heads)
        np.testing.assert_allclose(canonical, combine(setting, heads), rtol=1e-6, atol=1e-6)
    for off in (Guidance(), Guidance(2.0, (0.8, 0.9))):
        np.testing.assert_array_equal(combine(off.canonical(2), heads), heads[COND].final)
    # A network without a head, and one guided by a weaker network, have no such term.
    assert Guidance().canonical(0).terms == ()
    weaker = Guidance(2.0, weak=lambda x, t, y: Heads(x)).canonical(1)
    assert [type(term.source) for term in weaker.terms] == [g.Weaker]
