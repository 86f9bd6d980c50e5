"""The environment of a runner: library paths, CUDA headers and the preloaded BLAS."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from runner_client.errors import InvalidRequestError
from runner_client.host.blas import Blas, blas_at, find_blas, in_front, installed_blas, variants
from runner_client.host.environment import child_environment, package_folders

AVX512 = "flags : fpu avx2 fma avx512f avx512dq avx512bw avx512vl\n"
AVX2 = "flags : fpu avx2 fma\n"
DEBIAN = "usr/lib/x86_64-linux-gnu/libopenblas.so.0"


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


def write_cpuinfo(root: Path, flags: str) -> None:
    (root / "proc").mkdir(parents=True, exist_ok=True)
    (root / "proc/cpuinfo").write_text(f"processor : 0\n{flags}\nprocessor : 1\n{flags}")


def no_folders(_package: str) -> tuple[Path, ...]:
    return ()


def folders_below(root: Path) -> Callable[[str], tuple[Path, ...]]:
    return lambda package: (root / package,) if (root / package).is_dir() else ()


def no_blas(_environment: Mapping[str, str]) -> Blas | None:
    return None


@pytest.fixture
def openblas(tmp_path: Path) -> Blas:
    return Blas("OpenBLAS", touch(tmp_path / "libopenblas.so.0"), {"OPENBLAS_CORETYPE": "SKYLAKEX"})


def test_the_systems_openblas_is_found(tmp_path: Path) -> None:
    path = touch(tmp_path / DEBIAN)
    write_cpuinfo(tmp_path, AVX512)
    found = find_blas(root=tmp_path, prefix=tmp_path / "venv")
    assert found == Blas("OpenBLAS", path, {"OPENBLAS_CORETYPE": "SKYLAKEX"})


@pytest.mark.parametrize(
    ("flags", "env"),
    [
        (AVX512, {"OPENBLAS_CORETYPE": "SKYLAKEX"}),
        (AVX2, {"OPENBLAS_CORETYPE": "HASWELL"}),
        ("flags : sse2 avx512f\n", {}),
        ("", {}),
    ],
)
def test_openblas_kernels_follow_the_cpu(tmp_path: Path, flags: str, env: dict[str, str]) -> None:
    write_cpuinfo(tmp_path, flags)
    assert blas_at(touch(tmp_path / DEBIAN), root=tmp_path).env == env


def test_threaded_openblas_is_preferred_to_the_plain_one(tmp_path: Path) -> None:
    touch(tmp_path / "usr/lib64/libopenblas.so.0")
    threaded = touch(tmp_path / "usr/lib64/libopenblasp.so.0")
    found = find_blas(root=tmp_path, prefix=tmp_path / "venv")
    assert found is not None
    assert found.path == threaded


def test_mkl_needs_its_openmp_and_comes_second(tmp_path: Path) -> None:
    prefix = tmp_path / "venv"
    mkl = touch(prefix / "lib/libmkl_rt.so.3")
    assert find_blas(root=tmp_path, prefix=prefix) is None
    touch(prefix / "lib/libiomp5.so")
    assert find_blas(root=tmp_path, prefix=prefix) == Blas("MKL", mkl)
    system = touch(tmp_path / DEBIAN)
    found = find_blas(root=tmp_path, prefix=prefix)
    assert found is not None
    assert found.path == system


@pytest.mark.parametrize("folder", ["my venv", "a:b"])
def test_a_path_that_cannot_be_preloaded_is_skipped(tmp_path: Path, folder: str) -> None:
    prefix = tmp_path / folder
    path = touch(prefix / "lib/libopenblas.so.0")
    assert find_blas(root=tmp_path, prefix=prefix) is None
    with pytest.raises(InvalidRequestError, match="cannot be preloaded"):
        blas_at(path)


def test_without_a_library_none_is_found(tmp_path: Path) -> None:
    assert find_blas(root=tmp_path, prefix=tmp_path) is None
    assert installed_blas(root=tmp_path, prefix=tmp_path) == ()


def test_every_library_is_found_once(tmp_path: Path) -> None:
    prefix = tmp_path / "venv"
    touch(prefix / "lib/libiomp5.so")
    mkl = touch(prefix / "lib/libmkl_rt.so.3")
    system = touch(tmp_path / DEBIAN)
    (tmp_path / "usr/lib64").symlink_to(system.parent)
    own = touch(prefix / "lib/libopenblas.so.0")
    found = installed_blas(root=tmp_path, prefix=prefix)
    assert [blas.path for blas in found] == [own, system, mkl]
    assert found[0] == find_blas(root=tmp_path, prefix=prefix)


def test_each_library_has_variants_with_and_without_its_variables(openblas: Blas) -> None:
    mkl = Blas("MKL", Path("/opt/libmkl_rt.so.3"))
    assert variants((openblas, mkl)) == (openblas, Blas("OpenBLAS", openblas.path), mkl)


def test_the_flags_of_the_first_processor_count(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    text = f"processor : 0\n{AVX2}\nprocessor : 1\n{AVX512}"
    (tmp_path / "proc/cpuinfo").write_text(text)
    env = blas_at(touch(tmp_path / DEBIAN), root=tmp_path).env
    assert env == {"OPENBLAS_CORETYPE": "HASWELL"}


def test_the_blas_is_preloaded_with_its_variables(openblas: Blas) -> None:
    environment = in_front({"HOME": "/h"}, openblas)
    assert environment == {
        "HOME": "/h",
        "LD_PRELOAD": str(openblas.path),
        "OPENBLAS_CORETYPE": "SKYLAKEX",
        "OPENBLAS_THREAD_TIMEOUT": "4",
    }


def test_the_blas_comes_after_the_users_preloads(openblas: Blas) -> None:
    environment = in_front({"LD_PRELOAD": "/lib/libjemalloc.so.2"}, openblas)
    assert environment["LD_PRELOAD"] == f"/lib/libjemalloc.so.2:{openblas.path}"


@pytest.mark.parametrize(
    "preloaded", ["/opt/libmkl_rt.so.2", "libfoo.so libOpenBLAS.so", "libblis.so"]
)
def test_a_blas_preloaded_by_the_user_is_kept(openblas: Blas, preloaded: str) -> None:
    assert in_front({"LD_PRELOAD": preloaded}, openblas) == {"LD_PRELOAD": preloaded}


def test_variables_set_by_the_user_are_kept(openblas: Blas) -> None:
    environment = in_front({"OPENBLAS_CORETYPE": "ZEN", "OPENBLAS_NUM_THREADS": "1"}, openblas)
    assert environment["OPENBLAS_CORETYPE"] == "ZEN"
    assert environment["OPENBLAS_NUM_THREADS"] == "1"


def test_a_linux_cpu_gets_the_blas(openblas: Blas) -> None:
    environment = child_environment(
        {"A": "b"},
        backend="cpu",
        system="linux",
        folders=no_folders,
        find=lambda _environment: openblas,
    )
    assert environment["LD_PRELOAD"] == str(openblas.path)
    assert environment["A"] == "b"


@pytest.mark.parametrize(
    ("backend", "system", "blas"),
    [("cuda", "linux", "auto"), ("metal", "darwin", "auto"), ("cpu", "linux", "off")],
)
def test_other_backends_and_blas_off_get_no_blas(
    openblas: Blas, backend: str, system: str, blas: str
) -> None:
    environment = child_environment(
        {"A": "b"},
        backend=backend,  # type: ignore[arg-type]  # a parametrized literal
        blas=blas,
        system=system,
        folders=no_folders,
        find=lambda _environment: openblas,
    )
    assert environment == {"A": "b"}


def test_the_choice_comes_from_the_runners_cache_folder(openblas: Blas) -> None:
    asked: list[Mapping[str, str]] = []

    def find(environment: Mapping[str, str]) -> Blas:
        asked.append(environment)
        return openblas

    child_environment({"HOME": "/h"}, backend="cpu", system="linux", folders=no_folders, find=find)
    assert asked == [{"HOME": "/h"}]


def test_the_blas_can_be_named_by_path(tmp_path: Path) -> None:
    path = touch(tmp_path / "libfast.so")
    environment = child_environment(
        {}, backend="cpu", blas=str(path), system="linux", folders=no_folders, find=no_blas
    )
    assert environment == {"LD_PRELOAD": str(path)}
    with pytest.raises(InvalidRequestError, match="no BLAS library at"):
        child_environment(
            {}, backend="cpu", blas=str(tmp_path / "no.so"), system="linux", folders=no_folders
        )


def test_the_base_environment_is_not_modified(tmp_path: Path) -> None:
    (tmp_path / "mlx/lib").mkdir(parents=True)
    base = {"LD_LIBRARY_PATH": "/own"}
    child_environment(
        base, backend="cpu", system="linux", folders=folders_below(tmp_path), find=no_blas
    )
    assert base == {"LD_LIBRARY_PATH": "/own"}


def test_library_folders_come_before_the_users(tmp_path: Path) -> None:
    for folder in ("mlx/lib", "nvidia/cudnn/lib", "nvidia/cublas/lib"):
        (tmp_path / folder).mkdir(parents=True)
    environment = child_environment(
        {"LD_LIBRARY_PATH": "/own::/other"},
        backend="cuda",
        system="linux",
        folders=folders_below(tmp_path),
    )
    expected = ["mlx/lib", "nvidia/cublas/lib", "nvidia/cudnn/lib"]
    assert environment["LD_LIBRARY_PATH"].split(":") == [
        *(str(tmp_path / folder) for folder in expected),
        "/own",
        "/other",
    ]


def test_library_folders_are_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "mlx/lib").mkdir(parents=True)
    first = child_environment(
        {}, backend="cpu", system="linux", folders=folders_below(tmp_path), find=no_blas
    )
    second = child_environment(
        first, backend="cpu", system="linux", folders=folders_below(tmp_path), find=no_blas
    )
    assert first == second == {"LD_LIBRARY_PATH": str(tmp_path / "mlx/lib")}


def test_nvidia_folders_are_for_cuda_only(tmp_path: Path) -> None:
    (tmp_path / "nvidia/cublas/lib").mkdir(parents=True)
    environment = child_environment(
        {}, backend="cpu", system="linux", folders=folders_below(tmp_path), find=no_blas
    )
    assert environment == {}


@pytest.mark.parametrize("part", ["cu13", "cuda_runtime"])
def test_cuda_home_names_the_packages_headers(tmp_path: Path, part: str) -> None:
    touch(tmp_path / "nvidia" / part / "include/cuda_runtime.h")
    environment = child_environment(
        {}, backend="cuda", system="linux", folders=folders_below(tmp_path)
    )
    home = str(tmp_path / "nvidia" / part)
    assert (environment["CUDA_HOME"], environment["CUDA_PATH"]) == (home, home)


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH"])
def test_cuda_home_set_by_the_user_is_kept(tmp_path: Path, variable: str) -> None:
    touch(tmp_path / "nvidia/cu13/include/cuda_runtime.h")
    environment = child_environment(
        {variable: "/own/cuda"}, backend="cuda", system="linux", folders=folders_below(tmp_path)
    )
    cuda = {name: value for name, value in environment.items() if name.startswith("CUDA")}
    assert cuda == {variable: "/own/cuda"}


def test_package_folders_are_found_without_an_import() -> None:
    (folder,) = package_folders("runner_client")
    assert (folder / "host/environment.py").is_file()
    assert package_folders("no_such_package_anywhere") == ()
