"""A batch job through a service whose replicas do not survive all texts, in a Ray of its own; run as a program.

Prints what Prometheus would read at the end, once it has all metrics of some names.
"""

from __future__ import annotations

import sys
import tempfile
import time
import urllib.request

from tests.inference.poison import poison_engines


def main(source: str, model: str, *names: str) -> None:
    import ray

    from raylm.inference.batch import run_batch
    from raylm.inference.service.start import start_service, stop_service
    from raylm.settings import ServeSettings, Settings
    from raylm.tasks import TRANSLATE

    # The paths of Ray's sockets are short; its processes may still write while the directory is removed.
    with tempfile.TemporaryDirectory(prefix="raylm-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, _temp_dir=directory,
            object_store_memory=1 << 27, runtime_env={"worker_process_setup_hook": poison_engines},
            _system_config={"metrics_report_interval_ms": 1000},
        )  # fmt: skip
        service = start_service(ServeSettings(port=0), model)
        asked = urllib.request.Request(
            f"{service}/v1/translate", b'{"text": "Find"}', {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=60) as response:
            assert response.status == 200
        run_batch(Settings(), TRANSLATE, source, through="serve")
        node = ray.nodes()[0]
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        end = time.monotonic() + 60
        while True:  # processes tell once a second, on a busy machine later
            with urllib.request.urlopen(address, timeout=30) as response:
                lines = [line for line in response.read().decode().splitlines() if line.startswith("ray_raylm")]
            if all(any(name in line for line in lines) for name in names) or time.monotonic() > end:
                break
            time.sleep(0.5)
        sys.stdout.write("\n".join(lines))
        stop_service()
        ray.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
