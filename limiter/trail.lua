-- trail: what the level did, told as an operator wants to read it, and samples of what the fleet did.
-- Part of sync.lua.

local IDLE = 300000000 -- us without an admission after which a level says nothing any more
local CLIMB = 60000000 -- us between two entries about one way up
local SAMPLE_EVERY = 5000000 -- us

-- Made only by a call in which something happens.
local function trail()
  local tell = {}

  function tell.cut(before)
    local why = call.pause > 0 and string.format('refused, retry after %g s', call.pause / 1000000) or 'refused'
    event(now, 'cut', why, exact(before), exact(state.level), me)
    state.told = now
    redis.call('HSET', GATE, 'told_level', exact(state.level))
  end

  -- On the way up once a minute, and when the level is back at its ceiling.
  function tell.recovery(level, ceiling)
    local from = redis.call('HGET', GATE, 'told_level') or exact(state.level)
    event(now, 'recovery', level >= ceiling and 'at its ceiling' or 'successes', from, exact(level), me)
    state.told = now
    redis.call('HSET', GATE, 'told_level', exact(level))
  end

  -- Further refusals of one spell lengthen the pause; only its beginning is told.
  function tell.pause(pause, why)
    if now >= state.pause then event(now, 'pause', why, '0', exact(pause / 1000000), me) end
  end

  -- 'time attempts peak level', the last 240 of them; attempts counts admissions. A lease that no clock could
  -- have given is mended.
  function tell.sample()
    redis.call('RPUSH', ROOT .. 'samples', string.format('%.0f %.0f %.0f %s', now, state.attempt, state.peak,
      exact(state.level)))
    redis.call('LTRIM', ROOT .. 'samples', -240, -1)
    expire(ROOT .. 'samples')
    state.sampled, state.peak = now, state.in_use
    local last = redis.call('ZRANGE', LEASES, -1, -1, 'WITHSCORES')
    if last[2] and tonumber(last[2]) > now + 4 * state.lease then
      redis.call('ZADD', LEASES, whole(now + state.lease), last[1])
      state.reap_at = 0
      event(now, 'repaired', 'poisoned', 'lease of ' .. last[1], '', 'gate')
    end
  end

  return tell
end
