"""What holds a package at its locked version, asked of apt and dpkg."""

NODE = "molecule-gateway-0"
LOCKED = "580.105.08-1"


def test_the_package_is_there_in_the_locked_version_and_no_newer_one(host):
    assert host.package("libnvidia-ml1").version == LOCKED
    assert "580.126.20-1" in host.check_output("apt-cache madison libnvidia-ml1"), "there is no newer one"


def test_apt_would_change_it_neither_by_a_hold_nor_by_a_pin(host):
    assert "libnvidia-ml1" in host.check_output("apt-mark showhold").split()
    policy = host.check_output("apt-cache policy libnvidia-ml1")
    assert f"Candidate: {LOCKED}" in policy
    host.check_output("apt-mark unhold libnvidia-ml1")
    try:
        assert "Inst " not in host.check_output("apt-get --simulate dist-upgrade"), "the pin alone does not keep it"
    finally:
        host.check_output("apt-mark hold libnvidia-ml1")


def test_the_repository_is_trusted_for_its_own_key_alone(host):
    sources = host.file("/etc/apt/sources.list.d/gpuyard-nvidia.sources").content_string
    assert "Signed-By: /etc/apt/keyrings/gpuyard-nvidia.asc" in sources
    assert not host.run("ls /etc/apt/trusted.gpg.d | grep -i gpuyard").stdout
