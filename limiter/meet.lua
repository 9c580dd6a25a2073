-- meet: the gate that a call meets, and the process that makes it. Part of sync.lua.

-- Made only by a call that is the first of its kind: at a gate, with other values, for a flow.
local function firsts()
  local first = {}

  -- Another value than the one in force: told once in the trail, and to each process that brings it.
  function first.two_values(newer)
    if state.config == '' then return end
    local known = redis.call('HGET', GATE, 'rivals') or ''
    if newer then
      event(now, 'values', 'a process that started later brings others', state.config, call.limits, me)
      redis.call('HSET', GATE, 'rivals', state.config)
      local others = redis.call('ZCARD', LEASES) - (record and 1 or 0)
      if others > 0 then gate.note = 'older=' .. state.config end
    else
      if #known < 1000 and not string.find(known, call.limits, 1, true) then
        event(now, 'values', 'a process that started earlier still has others', call.limits, state.config, me)
        redis.call('HSET', GATE, 'rivals', known .. ';' .. call.limits)
      end
      gate.note = 'newer=' .. state.config
    end
  end

  function first.create_gate()
    for _, key in ipairs({ GATE, LEASES, TICKETS }) do redis.call('DEL', key) end -- what an older one left
    record, state.was_woken, state.was_override, state.was_config = nil, '', '', ''
    state.gen, state.attempt, state.place = now, math.max(now, state.attempt), math.max(1, state.place)
    state.override = redis.call('GET', OVERRIDE) or ''
    state.due = earliest_due()
    redis.call('DEL', FLOWS)
  end

  -- After a data loss the newest word that a process remembers holds again.
  function first.remember_override()
    local rule = rules()
    local theirs, ours = rule.read_override(call.override), rule.read_override(state.override)
    if not theirs or ours and ours.at >= theirs.at then return end
    state.override = call.override
    rule.keep_override(state.override, now)
    event(now, 'override', 'remembered by a process after a data loss', '', '', me)
  end

  -- Claims that no living record owns go back to their places (a gate that is new, a flow first served).
  function first.sweep(flow)
    local ids = redis.call('ZRANGEBYSCORE', queue_of(flow), whole(PARKED + 1), '+inf')
    for _, id in ipairs(ids) do
      local job = read_job(redis.call('HGET', JOBS, id))
      redis.call('ZADD', queue_of(flow), whole(job and job.place or state.place), id)
      redis.call('DEL', 'arq:in-progress:' .. id)
    end
  end

  return first
end

-- The limits of the process that started last.
local function take_limits()
  if call.limits == '' then return end
  local newer = call.started > state.config_from
  if call.limits ~= state.config then firsts().two_values(newer) end
  if not newer then return end
  rules().put_limits(state, call.limits)
  state.config_from = call.started
  state.reap_at = 0
end

-- The gate as it is for this call; false if nobody has given it values yet.
local function meet_gate()
  local was_cold = state.cold
  if state.gen == 0 then firsts().create_gate() end
  -- a birth that is later is of a gate whose clock ran ahead; 1 is that of a gate that had to be healed
  if call.birth > 0 and call.birth ~= state.gen and state.gen > 1 then state.cold = 1 end
  if call.started == 0 then call.started = now end
  if call.override ~= '' and call.override ~= state.override then firsts().remember_override() end
  take_limits()
  if state.lease == 0 then return false end
  gate.max, gate.rate, gate.held_until = effective(state, now)
  bound_level(state, gate.max)
  gate.opens = 0
  if state.cold == 1 then
    gate.opens = state.gen + math.max(state.lease, gate.rate > 0 and state.window or 0)
    if now >= gate.opens then
      state.cold = 0
    elseif was_cold == 0 then
      event(now, 'cold', 'the gate is new and its callers remember an older one', '0',
        exact((gate.opens - now) / 1000000), me)
    end
  end
  return true
end

-- A process that finds itself unknown though it holds something is admitted nothing in this call.
local function join()
  if record and not call.leave and call.seq > record.seq + 1 then reaper().leave_behind() end
  gate.unknown = not record and call.seq > 1 and call.held > 0
  if gate.unknown then call.permits, call.jobs = 0, 0 end
  if not record then
    -- what it gives back may be given back already, by this call, whose answer got lost, while it was known
    call.returned, call.successes = '', 0
    state.processes = state.processes + 1
    record = {
      number = state.processes, held = 0, seq = 0, kind = '-', idle = false, flows = 0, ends = 0, want = 0, since = now,
      pushed = '',
    }
    state.touched = 0
  end
  if record.flows ~= flow_count then
    for _, flow in ipairs(call.flows) do
      if redis.call('SADD', FLOWS, flow) == 1 then firsts().sweep(flow) end
    end
    record.flows = flow_count
    state.flows = redis.call('SCARD', FLOWS)
    state.touched = 0
  end
  record.extended = false
  gate.parked = whole(PARKED + record.number)
  state.active = state.active - is_active(record)
end
