-- heal: what is poisoned (a number that is none, text, a key of another type) is brought back to sane
-- values. Part of sync.lua and control.lua. One function holds it all, so that a call which meets nothing
-- poisoned makes none of the others.

local function healer()
  local healing = {
    STATE_KEYS = { GATE, 'hash', LEASES, 'zset', STARTS, 'list', TICKETS, 'zset', LATER, 'zset', JOBS, 'hash', FLOWS, 'set' },
    SIDE_KEYS = { OVERRIDE, 'string', SAVED, 'hash', EVENTS, 'stream', ROOT .. 'samples', 'list' },
  }

  -- Every process record that can be read; one that cannot is dropped: its process will say again what it holds.
  local function read_records()
    local records, all = {}, redis.call('HGETALL', GATE)
    for i = 1, #all, 2 do
      local process = string.match(all[i], '^p:(.*)$')
      local record = process and read_record(all[i + 1])
      if record then
        records[process] = record
      elseif process then
        redis.call('HDEL', GATE, all[i], 'a:' .. process)
      end
    end
    return records
  end

  -- Claims whose owner has no record go back to their places; returns their flows.
  function healing.free_orphans(state)
    local owners, flows = {}, {}
    for _, record in pairs(read_records()) do owners[PARKED + record.number] = true end
    for _, flow in ipairs(redis.call('SMEMBERS', FLOWS)) do
      local rows = redis.call('ZRANGEBYSCORE', queue_of(flow), whole(PARKED + 1), '+inf', 'WITHSCORES')
      for i = 1, #rows, 2 do
        if not owners[tonumber(rows[i + 1])] then
          local job = read_job(redis.call('HGET', JOBS, rows[i]))
          redis.call('ZADD', queue_of(flow), whole(job and job.place or state.place), rows[i])
          redis.call('DEL', 'arq:in-progress:' .. rows[i])
          flows[#flows + 1] = flow
        end
      end
    end
    return flows
  end

  -- The sums over the records, and what else can be counted anew.
  function healing.count_anew(state)
    state.in_use, state.active, state.callers = 0, 0, 0
    for _, record in pairs(read_records()) do
      state.in_use = state.in_use + record.held
      state.active = state.active + is_active(record)
      state.callers = state.callers + calls(record.kind)
      state.processes = math.max(state.processes, record.number)
    end
    state.waiting, state.flows = redis.call('ZCARD', TICKETS), redis.call('SCARD', FLOWS)
    local last = redis.call('ZRANGE', TICKETS, -1, -1, 'WITHSCORES')
    state.ticket = math.max(state.ticket, last[2] and tonumber(last[2]) or 0)
    state.due = earliest_due()
  end

  -- Sane values for whatever `load` named; returns the names.
  function healing.heal(state, now, birth)
    local bad, names = state.poisoned, {}
    for name in string.gmatch(bad, '[^,]+') do names[name] = true end
    local all = names.state -- no state at all
    if all or names.processes then -- numbers of living processes are never given again
      for _, flow in ipairs(redis.call('SMEMBERS', FLOWS)) do
        local last = redis.call('ZRANGE', queue_of(flow), -1, -1, 'WITHSCORES')
        state.processes = math.max(state.processes, last[2] and tonumber(last[2]) - PARKED or 0)
      end
    end
    healing.count_anew(state)
    if all or names.gen then state.gen = birth > 0 and birth or 1 end
    if all or names.attempt then state.attempt = now end -- it began at the birth and grows slower than time
    state.place = math.max(1, state.place)
    if not rules().put_limits(state, state.config) then state.config, state.config_from = '', 0 end
    state.reap_at, state.touched, state.woken, state.poisoned = 0, 0, '', false
    event(now, 'repaired', 'poisoned', bad, '', 'gate')
    return bad
  end

  local function type_of(key)
    local answer = redis.call('TYPE', key)
    return type(answer) == 'table' and answer.ok or answer
  end

  -- Delete the keys of another type; returns their names without the root.
  function healing.drop_wrong(pairs_)
    local dropped = {}
    for i = 1, #pairs_, 2 do
      local found = type_of(pairs_[i])
      if found ~= 'none' and found ~= pairs_[i + 1] then
        redis.call('DEL', pairs_[i])
        dropped[#dropped + 1] = string.sub(pairs_[i], #ROOT + 1)
      end
    end
    return dropped
  end

  -- A start whose time cannot be read, or lies beyond every slack, counts from now; none is forgotten.
  function healing.mend_starts(state, now)
    local stamps, wrong = {}, 0
    for _, text in ipairs(redis.call('LRANGE', STARTS, 0, -1)) do
      local stamp = rules().number_in(text, 0, now + math.max(5000000, state.window / 240))
      if not stamp then stamp, wrong = now, wrong + 1 end
      stamps[#stamps + 1] = stamp
    end
    if wrong == 0 then return false end
    table.sort(stamps)
    redis.call('DEL', STARTS)
    for _, stamp in ipairs(stamps) do redis.call('RPUSH', STARTS, whole(stamp)) end
    redis.call('PEXPIRE', STARTS, WEEK)
    return true
  end

  -- Part of the state is gone for good: it is a gate that lost its data. It holds while its processes say
  -- again what they run and hold. Claims that nobody keeps go back to their places as processes come.
  function healing.hold_as_after_a_loss(state)
    for _, field in ipairs(redis.call('HKEYS', GATE)) do
      if string.match(field, '^[pa]:') then redis.call('HDEL', GATE, field) end
    end
    redis.call('DEL', LEASES, TICKETS, FLOWS)
    state.gen, state.cold, state.in_use, state.active, state.callers = 0, 1, 0, 0, 0
    state.waiting, state.flows, state.reap_at, state.touched = 0, 0, 0, 0
    state.woken, state.woken_due, state.behind = '', 0, 0
  end

  -- Runs that waited for a time, when the times are gone: they are due now.
  function healing.requeue_delayed(state, flow)
    for _, id in ipairs(redis.call('ZRANGEBYSCORE', queue_of(flow), whole(PARKED), whole(PARKED))) do
      local job = read_job(redis.call('HGET', JOBS, id))
      redis.call('ZADD', queue_of(flow), whole(job and job.place or math.max(1, state.place)), id)
    end
  end
  return healing
end
