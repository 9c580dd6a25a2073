-- trail: what the level did, told as an operator wants to read it, and samples of what the fleet did.
-- Part of sync.lua.

local IDLE = 300000000 -- us without an admission after which a level says nothing any more
local CLIMB = 60000000 -- us between two entries about one way up
local SAMPLE_EVERY, SAMPLES = 5000000, 240 -- us; how many are kept: 20 minutes of a busy gate

local function tell_cut(before)
  local why = call.pause > 0 and string.format('refused, retry after %g s', call.pause / 1000000) or 'refused'
  event(now, 'cut', why, exact(before), exact(state.level), me)
  state.told, state.told_level = now, state.level
end

-- One entry when the level is back at its ceiling, on the way there at most one a minute.
local function tell_recovery(level, ceiling)
  if level == state.level or level < ceiling and now - state.told < CLIMB then return end
  local from = state.told_level > 0 and state.told_level or state.level
  event(now, 'recovery', level >= ceiling and 'at its ceiling' or 'successes', exact(from), exact(level), me)
  state.told, state.told_level = now, level
end

-- Further refusals of one spell lengthen the pause; only its beginning is told.
local function pause_for(pause)
  if now >= state.pause then
    event(now, 'pause', 'asked for by the provider', '0', exact(pause / 1000000), me)
  end
  state.pause = math.max(state.pause, now + pause)
end

-- 'time attempts peak level': attempts counts admissions. A lease that no clock could have given is mended.
local function take_sample()
  redis.call('RPUSH', ROOT .. 'samples', string.format('%.0f %.0f %.0f %s', now, state.attempt, state.peak,
    exact(state.level)))
  redis.call('LTRIM', ROOT .. 'samples', -SAMPLES, -1)
  expire(ROOT .. 'samples')
  state.sampled, state.peak = now, state.in_use
  local last = redis.call('ZRANGE', LEASES, -1, -1, 'WITHSCORES')
  if last[2] and tonumber(last[2]) > now + 4 * state.lease then
    redis.call('ZADD', LEASES, whole(now + state.lease), last[1])
    state.reap_at = 0
    event(now, 'repaired', 'poisoned', 'lease of ' .. last[1], '', 'gate')
  end
end
