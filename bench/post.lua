-- wrk's script: posts the body in the file that its argument names; prints one line of JSON.
function init(args)
  local file = io.open(args[1], "rb")
  wrk.method = "POST"
  wrk.headers["content-type"] = "application/json"
  wrk.body = file:read("*a")
  file:close()
end

function done(summary, latency)
  local e = summary.errors
  io.write(string.format(
    '\n{"calls": %d, "failed": %d, "seconds": %f, "p50": %f, "p99": %f}\n',
    summary.requests - e.status, e.connect + e.read + e.write + e.status + e.timeout,
    summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
