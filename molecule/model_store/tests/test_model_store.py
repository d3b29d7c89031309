"""The model's directory, read by the program that a unit runs before it serves it."""

NODE = "molecule-chat-0"
MODELS = "/var/lib/models"
VERIFY = "python3 /usr/local/lib/gpuyard/model_verify.py"
MODEL = "smollm2-135m-instruct"


def test_the_model_is_what_its_manifest_says_byte_by_byte(host):
    path = host.check_output(f"ls -d {MODELS}/{MODEL}/*/").rstrip("/")
    assert "files are as their manifest says" in host.check_output(f"{VERIFY} {path}")


def test_whoever_serves_it_can_read_it_and_not_change_it(host):
    assert not host.check_output(f"find {MODELS} ! -user root -o -type f -perm /022")
    assert host.run(f"runuser -u nobody -- cat {MODELS}/{MODEL}/*/config.json").rc == 0


def test_nothing_is_left_of_what_was_refused_or_replaced(host):
    assert host.check_output(f"ls {MODELS}") == MODEL
    assert not host.check_output(f"find {MODELS} -name '*.partial' -o -name '*.part' -o -name '*.old' -o -name '*.new'")


def test_the_shared_copy_was_filled_and_its_damage_did_not_come_over(host):
    (version,) = host.check_output("ls -A /srv/shared-models/" + MODEL).split()
    damaged = host.run(f"{VERIFY} /srv/shared-models/{MODEL}/{version}")
    assert damaged.rc == 1
    assert [line.partition(":")[0] for line in damaged.stderr.splitlines() if "MODEL-" in line] == ["MODEL-HASH"]
    assert host.run(f"{VERIFY} {MODELS}/{MODEL}/{version}").rc == 0
