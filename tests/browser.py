"""ONNX Runtime Web in headless Chromium, driven from Python.

The page asks this process for jobs and posts what they gave, so that nothing but a browser and the files of
`npm install onnxruntime-web` is needed.
"""

import json
import queue
import subprocess
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = """<!doctype html><script src="/ort/ort.min.js"></script><script>
ort.env.wasm.wasmPaths = "/ort/"; ort.env.wasm.numThreads = 1;
async function work(job) {
  const sessions = await Promise.all(job.files.map(
    file => ort.InferenceSession.create("/" + file, {executionProviders: ["wasm"]})));
  const tensors = job.inputs.map(({shape, data}) => new ort.Tensor("float32", Float32Array.from(data), shape));
  const times = sessions.map(() => []), results = [];
  for (let round = 0; round < job.rounds; round++)
    for (const [i, session] of sessions.entries()) {
      const start = performance.now();
      const found = await session.run(Object.fromEntries(session.inputNames.map((name, j) => [name, tensors[j]])));
      times[i].push(performance.now() - start);
      results[i] = session.outputNames.map(name => ({shape: found[name].dims, data: Array.from(found[name].data)}));
    }
  return {results, times};
}
(async () => {
  for (;;) {
    const job = await (await fetch("/job")).json();
    if (!job) break;
    const done = await work(job).catch(error => ({error: String(error)}));
    await fetch("/done", {method: "POST", body: JSON.stringify(done)});
  }
})();
</script>"""


class Browser:
    """A page that runs ONNX files of one folder.

    Args:
        chromium: the browser's program.
        dist: folder `onnxruntime-web/dist`.
        folder: where the ONNX files are.
    """

    def __init__(self, chromium: str, dist: Path, folder: Path):
        self.jobs, self.done = queue.Queue(), queue.Queue()
        jobs, done = self.jobs, self.done

        class Handler(SimpleHTTPRequestHandler):
            def translate_path(self, path):
                name = path.rpartition("/")[2]
                return str(dist / name) if path.startswith("/ort/") else str(folder / name)

            def do_GET(self):
                if self.path in ("/", "/job"):
                    self._send(PAGE if self.path == "/" else json.dumps(jobs.get()))
                else:
                    super().do_GET()

            def do_POST(self):
                done.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self._send("")

            def _send(self, text):
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{self.server.server_address[1]}/"
        profile = f"--user-data-dir={folder / 'profile'}"
        command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", profile, address]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def run(self, files, arrays, rounds=1):
        """Outputs of each file as arrays, and its times in ms, all files in turn in every round."""
        import numpy as np

        inputs = [{"shape": list(each.shape), "data": each.ravel().tolist()} for each in arrays]
        self.jobs.put({"files": list(files), "inputs": inputs, "rounds": rounds})
        done = self.done.get(timeout=500)
        if "error" in done:
            raise RuntimeError(done["error"])
        results = [
            [np.asarray(each["data"], np.float32).reshape(each["shape"]) for each in outputs]
            for outputs in done["results"]
        ]
        return results, done["times"]

    def close(self):
        """Let the page end, then the browser."""
        self.jobs.put(None)
        self.process.terminate()
        self.process.wait(timeout=30)
        self.server.shutdown()
