"""The locked toolkit is there, held, and the one that compilers find."""

NODE = "molecule-chat-0"


def test_the_locked_toolkit_is_installed_and_held(host):
    assert host.package("cuda-toolkit-13-0").version == "13.0.2-1"
    assert "cuda-toolkit-13-0" in host.check_output("apt-mark showhold").split()


def test_the_compiler_that_is_found_is_the_locked_one(host):
    assert "V13.0.2" in host.check_output("/usr/local/cuda/bin/nvcc --version")


def test_its_pins_are_its_own(host):
    """Two owners of locked packages on one node do not write over each other."""
    pins = host.file("/etc/apt/preferences.d/gpuyard-cuda-toolkit.pref").content_string
    assert "Package: cuda-toolkit-13-0\nPin: version 13.0.2-1\n" in pins
    assert "nvidia-driver" not in pins
