"""Methods side by side: the errors are those of the hypergradients, the memory that of the tensors."""

import json
import statistics
import warnings
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from oracles import generator, quadratic, relative_error
from peers import conv_net

from metaimplicit import (
    CG,
    MINRES,
    BilevelProblem,
    Composite,
    Dense,
    Factored,
    GradientDescent,
    Hessian,
    Implicit,
    Lanczos,
    Neumann,
    Nystrom,
    NystromCG,
    Proximal,
    Status,
    hypergradient,
)
from metaimplicit.diagnostics.compare import comparable_methods, compare
from metaimplicit.diagnostics.memory import LiveBytes
from metaimplicit.methods import METHODS, make_method

SPECTRA = [[0.5, 1, 2, 3, 5, 8, 9, 10], [1, 1, 1, 2, 2, 2, 4, 4], [1, 2, 3, 4, 5, 6, 7, 8]]
FACTORED = {"kfac", "ekfac", "diagonal"}
SOLVERS = set(comparable_methods()) - FACTORED
STAY = GradientDescent(steps=400, lr=0.15)


def test_errors_are_those_of_the_hypergradients():
    oracle = quadratic(SPECTRA)
    found = compare(
        oracle.problem, oracle.meta, oracle.data, inner=STAY, products=(2, 4), seeds=2, batched=True
    )
    assert {row.method for row in found.rows} == set(SOLVERS)
    assert (found.size, found.tasks, found.curvature) == (8, 3, "hessian")
    assert (found.smallest, found.largest) == pytest.approx((0.5, 10.0))
    assert found.inner_gradient_norm < 1e-10
    for products in (2, 4):
        for name, solver in (("cg", CG(products, tol=0.0)), ("neumann", Neumann(terms=1))):
            got = hypergradient(
                oracle.problem,
                oracle.meta,
                oracle.data,
                inner=STAY,
                method=Implicit(solver),
                batched=True,
            )
            expected = relative_error(got.grads["phi"], oracle.exact["phi"])
            assert found.error(name, products) == pytest.approx(expected, rel=1e-6)
        assert found.error("auto", products) == pytest.approx(found.error("cg", products))
    direct = relative_error(oracle.meta["phi"], oracle.exact["phi"])  # ∂g/∂φ = φ
    assert found.direct == pytest.approx(direct)
    errors = [row.error for row in found.rows if row.products == 4]
    assert errors == sorted(errors)
    with pytest.raises(KeyError):
        found.error("cg", 3)


def test_every_row_is_its_solver():
    """At 8 products of n = 8 and at 20, with damping: each row against `hypergradient` with the solver spelt out."""
    oracle = quadratic(
        [[0.5, 1, 2, 3, 5, 8, 9, 10], [-1, 1, 1, 2, 2, 2, 4, 4], [1, 2, 3, 4, 5, 6, 7, 8]]
    )
    loop = GradientDescent(steps=3, lr=0.05)
    spelt = {
        "cg": lambda p: CG(p, tol=0.0),
        "minres": lambda p: MINRES(p, tol=0.0),
        "lanczos": lambda p: Lanczos(p, tol=0.0),
        "neumann": lambda p: Neumann(terms=max(1, p - 5)),
        "nystrom": lambda p: Nystrom(rank=p),
        "nystrom-gaussian": lambda p: Nystrom(rank=p, sketch="gaussian"),
        "nystrom-cg": lambda p: NystromCG(rank=(p + 1) // 2, max_steps=p // 2, tol=0.0),
    }

    def run(solver, seed=0):
        torch.manual_seed(seed)
        method = Implicit(solver, damping=0.25)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = hypergradient(
                oracle.problem, oracle.meta, oracle.data, inner=loop, method=method, batched=True
            )
        return found.grads["phi"], found.report

    before = torch.get_rng_state()
    found = compare(
        oracle.problem,
        oracle.meta,
        oracle.data,
        inner=loop,
        damping=0.25,
        products=(5, 20),
        seeds=3,
        batched=True,
    )
    assert torch.equal(before, torch.get_rng_state())
    exact, _ = run(Dense())
    for row in found.rows:
        if row.method in spelt:
            runs = [
                run(spelt[row.method](row.products), seed)
                for seed in range(3 if "nystrom" in row.method else 1)
            ]
            errors = [relative_error(grad, exact) for grad, _ in runs]
            cosines = [float(F.cosine_similarity(grad, exact, dim=0)) for grad, _ in runs]
            assert row.error == pytest.approx(statistics.median(errors), rel=1e-6, abs=1e-12)
            assert row.cosine == pytest.approx(statistics.median(cosines), rel=1e-9)
            worst = statistics.median([float(report.residual.max()) for _, report in runs])
            assert row.residual == pytest.approx(worst, rel=1e-6, abs=1e-12)
            counts = Counter(Status(int(s)).name for _, report in runs for s in report.status)
            assert row.status == ", ".join(name for name, _ in counts.most_common())
    assert {row.method for row in found.rows if row.products == 5} == set(SOLVERS)


def test_factored_rows_are_damped_and_memory_is_that_of_a_basis():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(40, 20), torch.nn.Tanh(), torch.nn.Linear(20, 3)
    ).double()
    start = {name: p.detach() for name, p in model.named_parameters()}
    x, y = torch.randn(9, 40).double(), torch.arange(9) % 3
    composite = Composite(
        outputs=lambda params, meta, data: torch.func.functional_call(
            model, params, (x * meta["scale"],)
        ),
        loss=lambda z, data: F.cross_entropy(z, y),
        penalty=Proximal(0.1, center="zero"),
        module=model,
    )
    problem = BilevelProblem(
        lambda meta, data: start,
        composite,
        lambda params, meta, data: torch.func.functional_call(model, params, (x,)).square().mean(),
    )
    meta, loop = {"scale": torch.ones(40).double()}, GradientDescent(1, 0.1)
    found = compare(
        problem,
        meta,
        x,
        inner=loop,
        damping=0.3,
        products=(30,),
        methods=["kfac", "ekfac", "lanczos"],
    )
    exact = hypergradient(
        problem, meta, x, inner=loop, method=Implicit(Dense(), damping=0.3)
    ).grads["scale"]
    for name in ("kfac", "ekfac"):
        method = Implicit(Factored(), curvature=name, damping=0.3)
        got = hypergradient(problem, meta, x, inner=loop, method=method).grads["scale"]
        assert found.error(name, 30) == pytest.approx(relative_error(got, exact), rel=1e-9)
    (lanczos,) = (row for row in found.rows if row.method == "lanczos")
    basis = 30 * found.size * 8 / 2**20
    assert 2 * basis < lanczos.mebibytes < 5 * basis


def test_a_sketch_of_more_than_n_columns_is_left_out():
    oracle = quadratic(SPECTRA)
    found = compare(
        oracle.problem, oracle.meta, oracle.data, inner=STAY, products=(8, 9), seeds=1, batched=True
    )
    assert {r.method for r in found.rows if r.products == 8} == set(SOLVERS)
    missing = set(SOLVERS) - {r.method for r in found.rows if r.products == 9}
    assert missing == {"nystrom", "nystrom-gaussian", "nystrom-cg"}
    assert all(
        row.error < 1e-8 for row in found.rows if row.method in ("cg", "minres", "lanczos", "auto")
    )


def test_every_implicit_flag_can_be_compared():
    flags = {n for n in METHODS if isinstance(make_method(n), Implicit)} - {
        "dense",
        "t1-t2",
        "soba",
        "amigo",
    }
    assert flags == set(comparable_methods())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["cg", "gmres"]}, "methods: got gmres, expected some of cg, "),
        ({"methods": ["unrolled"]}, "methods: got unrolled"),
        ({"seeds": 0}, "seeds, products: got 0"),
        ({"products": (0, 3)}, "expected at least 1"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    oracle = quadratic(SPECTRA)
    with pytest.raises(ValueError, match=message):
        compare(oracle.problem, oracle.meta, oracle.data, inner=STAY, batched=True, **options)


def test_live_bytes_are_counted_to_the_byte():
    with LiveBytes() as memory:
        a = torch.zeros(1000)
        b = a + 1
        del a
        b += 1
        view = b[:10]
        c = b * 2
        del b, view
        d = c.clone()
        torch.zeros(500)
        del c, d
    assert memory.peak == 3 * 4000 - 4000 + 2000
    outside = torch.zeros(1000)
    with LiveBytes() as memory:
        outside += 1
        outside[:10].mul_(2)
    assert memory.peak == 0
    matrix = torch.randn(50, 50, requires_grad=True)
    with LiveBytes() as memory:
        torch.autograd.grad((matrix @ matrix).sum(), matrix)
    assert 3 * 10_000 <= memory.peak <= 4 * 10_000 + 100


def test_nystrom_in_chunks_of_one_adds_four_vectors_to_a_product_at_the_most():
    """A conv net of 99 thousand parameters; the peak of live tensors, in vectors of as many numbers."""
    images, labels = torch.rand(4, 1, 28, 28, generator=generator(0)), torch.arange(4)
    torch.manual_seed(0)
    model = conv_net()
    params = {name: p.detach().unsqueeze(0) for name, p in model.named_parameters()}

    def loss(stacked):
        one = {name: p.squeeze(0) for name, p in stacked.items()}
        return F.cross_entropy(torch.func.functional_call(model, one, (images,)), labels).unsqueeze(
            0
        )

    operator = Hessian(loss, params)
    n = operator.shape[1]
    assert n == 98_970
    b = torch.randn(1, n, generator=generator(1))

    def peak(run):
        with LiveBytes() as memory:
            run()
        return memory.peak / (4 * n)

    product = peak(lambda: operator.matvec(b))
    for sketch in ("columns", "gaussian"):
        streamed = Nystrom(rank=10, rho=1.0, sketch=sketch, chunk=1, generator=generator(2))
        assert peak(lambda s=streamed: s.solve(operator, b)) < product + 4
        assert peak(lambda s=sketch: Nystrom(10, 1.0, s).solve(operator, b)) > product + 10


def test_the_script_leaves_a_table_json_and_plots(tmp_path, capsys):
    from compare import Settings, main

    main(Settings(problems=("logistic",), products=(3, 6), seeds=1, out=tmp_path))
    assert "3 products: auto / " in capsys.readouterr().out
    stored = json.loads((tmp_path / "problems.json").read_text())["found"]["logistic"]
    assert stored["size"] == 100
    assert {row["method"] for row in stored["rows"]} == set(SOLVERS)
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    main(Settings(problems=("logistic",), products=(3, 101), seeds=1, out=tmp_path))
    assert "       —" in capsys.readouterr().out  # no sketch of 101 columns of 100
    with pytest.raises(
        ValueError, match="--problems: got quadratics, expected some of quadratic-well"
    ):
        main(Settings(problems=("quadratics",), out=tmp_path))


def test_peers_are_held_against_the_same_values(tmp_path, capsys):
    from compare import Settings, main

    main(Settings(peers=True, out=tmp_path))
    rows = json.loads((tmp_path / "peers.json").read_text())["found"]["errors"]
    assert len(rows) == 9
    assert all(row["ours"] < 1e-8 for row in rows)
    (higher,) = (row for row in rows if row["library"].startswith("higher"))
    assert (
        higher["theirs"] > 0.1
    )  # its derivative in β₂ is wrong: if this fails it has been repaired
