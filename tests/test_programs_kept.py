"""Compiled programs outlive the process: where they are kept, and where not."""

import jax

from diffjax.main import keep_programs


def test_where_programs_are_kept(tmp_path, monkeypatch, caplog):
    def kept(**environment):
        for name in ('JAX_COMPILATION_CACHE_DIR', 'XDG_CACHE_HOME'):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        before = jax.config.jax_compilation_cache_dir
        jax.config.update('jax_compilation_cache_dir', None)
        try:
            keep_programs()
            return jax.config.jax_compilation_cache_dir
        finally:
            jax.config.update('jax_compilation_cache_dir', before)

    monkeypatch.setenv('HOME', str(tmp_path))
    assert kept() == str(tmp_path / '.cache' / 'diffjax' / 'programs')
    assert (tmp_path / '.cache' / 'diffjax' / 'programs').stat().st_mode & 0o777 == 0o700
    assert kept(XDG_CACHE_HOME=str(tmp_path / 'xdg')) == str(tmp_path / 'xdg' / 'diffjax' / 'programs')
    assert kept(JAX_COMPILATION_CACHE_DIR='') is None  # JAX has read it already: nowhere
    (tmp_path / 'file').touch()
    assert kept(XDG_CACHE_HOME=str(tmp_path / 'file')) is None
    assert 'not kept' in caplog.text
