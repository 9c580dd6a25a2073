-- renew: keep the lease of a process whose event loop is too busy to call, and the gate. Decides nothing else.
--
-- KEYS, ARGV[1] process, ARGV[2] now   as in gate.lua
--
-- Returns the us the lease now lasts, or 0: the gate does not know the process, which must sync at once.

local state, record = load(ARGV[1])
if state.gen == 0 then return 0 end
local now = clock(state)
extend_after_stall(state, now)
if not record then
  save(state)
  return 0
end
record.extended = false
record.ends = math.max(record.ends, now + state.lease)
redis.call('ZADD', LEASES, whole(record.ends), ARGV[1])
local renew = lifetimes_are_due(state, now)
save(state, { 'p:' .. ARGV[1], write_record(record) })
if renew then renew_lifetimes(state) end
return record.ends - now
